"""A data set of pictures."""

import torch
from torch.utils.data import Dataset


class Pictures(Dataset):
    """A data set in the manner of torchvision: a list of targets, and inputs decoded one at a time."""

    def __init__(self, labels, with_targets=True):
        self.decoded = 0
        self.labels = labels
        if with_targets:
            self.targets = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.decoded += 1
        return torch.full((2, 2), float(index)), self.labels[index]
