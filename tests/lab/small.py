"""The smallest recipe that trains, prunes and measures."""

TEXT = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 100}
train: {epochs: 1, batch_size: 128}
prune: {ratios: [0.25, 0.5], ignored: [classifier]}
fusion: paper
output: OUT
threads: 1
"""
