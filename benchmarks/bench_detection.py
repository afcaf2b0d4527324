"""Decoding, filter, top-k and suppression at 640x640 (16,800 anchors): ``pytest --benchmark-only -k detection``.

About 50 faces, each predicted by many anchors; the threshold decides how many candidates enter suppression.
"""

import pytest
import torch
from ops import competitors, measure, policy

from ffkernels import Policy
from ffkernels.ops.detection import detect


def predictions(anchors: int = 16800, faces: int = 50):
    generator = torch.Generator().manual_seed(0)
    face = torch.rand(faces, 2, generator=generator)
    which = torch.randint(0, faces, (anchors,), generator=generator)
    centre = face[which] + torch.randn(anchors, 2, generator=generator) * 0.01
    priors = torch.cat((centre, torch.full((anchors, 2), 0.05)), dim=1)
    bbox, landmarks = (torch.randn(anchors, n, generator=generator) for n in (4, 10))
    return bbox, torch.rand(anchors, generator=generator) ** 8, landmarks, priors


@pytest.mark.parametrize("score_threshold", [0.02, 0.5])
@pytest.mark.parametrize("competitor,device", competitors("detection"))
def test_detection(benchmark, competitor, device, score_threshold):
    benchmark.group = f"detection, scores over {score_threshold} {device}"
    arguments = [t.to(device) for t in predictions()]

    def run():
        return detect(*arguments, score_threshold, policy=policy(competitor))

    torch.testing.assert_close(run(), detect(*arguments, score_threshold, policy=Policy("0")))
    measure(benchmark, run, device, sum(t.nbytes for t in arguments))
