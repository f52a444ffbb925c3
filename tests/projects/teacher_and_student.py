"""Semi-supervised training as a teacher and a student do it, small.

Labelled images are of one domain, unlabelled ones of another. The teacher, an average of the
student's weights, labels weakly augmented images, which the student learns strongly augmented.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from list_heads import Backbone


class Detector(nn.Module):
    """Logits of three classes, or with targets a dict of losses."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.logits = nn.Linear(16, 3)

    def forward(self, images, targets=None):
        logits = self.logits(self.head(self.backbone(images)[-1]).mean((2, 3)))
        return logits if targets is None else {"loss": F.cross_entropy(logits, targets)}


class Data:
    """Batches of (images, labels) of 8, by a generator of its own."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def labelled(self):
        labels = torch.randint(0, 3, (8,), generator=self.generator)
        images = torch.randn(8, 3, 64, 64, generator=self.generator)
        images[range(8), labels] += 0.7
        return images, labels

    def unlabelled(self):
        """Of another camera; its labels are for tests alone."""
        images, labels = self.labelled()
        return 0.5 * images + 1.5, labels

    def strong(self, images):
        gain = 0.5 + torch.rand(len(images), 3, 1, 1, generator=self.generator)
        return images * gain + 0.3 * torch.randn(images.shape, generator=self.generator)


def make():
    """A student, and a teacher that no gradient reaches."""
    student = Detector()
    return student, copy.deepcopy(student).requires_grad_(False).eval()


def train(student, teacher, data, steps, decay=0.9):
    """Parameters of the teacher follow the student's; its buffers do not."""
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    for _ in range(steps):
        images, labels = data.labelled()
        weak, _ = data.unlabelled()
        with torch.no_grad():
            pseudo = teacher(weak).argmax(1)
        student.train()
        loss = student(images, labels)["loss"]
        loss = loss + 0.1 * student(data.strong(weak), pseudo)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for of_teacher, of_student in zip(
                teacher.parameters(), student.parameters(), strict=True
            ):
                of_teacher.lerp_(of_student, 1 - decay)
