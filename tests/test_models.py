import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from layers import randomize
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import featherface.models
from featherface import create_model, list_models
from featherface.errors import FeatherFaceError
from featherface.models.anchors import anchors, level_sizes
from featherface.models.attention import SpatialStatistics
from featherface.models.context import SSH_Deformable
from featherface.models.summary import render, summarize
from featherface.models.ultra import INNOVATIONS
from ffkernels import Policy
from ffkernels.nn import DeformConv, FusedModule

PARAMETERS = {
    "featherface_v1": 487_103,
    "featherface_v1_dcn": 541_130,
    "featherface_v1_ssh": 489_015,
    "featherface_v2": 256_148,
    "featherface_v2_ultra": 248_136,
}
COMPONENTS = {
    "featherface_v1": {"attention": 4_925, "pyramid": 113_610, "context": 148_296, "heads": 7_200},
    "featherface_v1_dcn": {"attention": 4_925, "pyramid": 113_610, "context": 148_296 + 3 * 18_009, "heads": 7_200},
    "featherface_v1_ssh": {"pyramid": 77_916, "context": 192_555, "heads": 5_472},
    "featherface_v2": {"attention": 1_248, "pyramid": 19_508, "context": 6_768, "heads": 15_552},
    "featherface_v2_ultra": {
        "attention": 1_248 - 128 - 400,
        "pyramid": 19_508 - 2_176,
        "context": 6_768 - 4_320,
        "heads": 15_552 - 1_088,
        "dynamic gate": 100,
    },
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def close(outputs, expected, **tolerance):
    for y, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, e, **tolerance)


@pytest.fixture(scope="module", params=PARAMETERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """A model in evaluation mode whose weights and statistics all differ from their defaults; not to be changed."""
    torch.manual_seed(0)
    return randomize(create_model(name)).eval().requires_grad_(False)


class TestCounts:
    def test_parameters(self, name):
        assert count(create_model(name)) == PARAMETERS[name]

    def test_components(self, name):
        summary = summarize(create_model(name))
        got = {row.name: row.parameters for row in summary.components}
        assert got == {"backbone": 213_072, "channel shuffle": 0, **COMPONENTS[name]}
        assert summary.parameters == sum(got.values()) == PARAMETERS[name]
        assert summary.weight_bytes == 4 * PARAMETERS[name]

    @pytest.mark.parametrize(
        "name,gflop",
        [
            ("featherface_v1", 1.93),
            ("featherface_v1_ssh", 2.03),
            ("featherface_v2", 0.869),
            ("featherface_v2_ultra", 0.882),
        ],
    )
    def test_flops_at_640(self, name, gflop):
        summary = summarize(create_model(name))
        assert round(summary.flops / 1e9, 3 if gflop < 1 else 2) == gflop
        assert sum(row.flops for row in summary.components) == summary.flops
        assert all(row.flops > 0 for row in summary.components if row.name not in ("channel shuffle", "dynamic gate"))

    def test_flops_follow_the_size(self):
        model = create_model("featherface_v2")
        whole, quarter = summarize(model, 640, 640), summarize(model, 320, 320)
        assert 3.95 < whole.flops / quarter.flops <= 4
        assert summarize(model, 201, 333).height == 201

    def test_summary_leaves_the_model_alone(self):
        model = create_model("featherface_v2", fused=True)
        before = copy.deepcopy(model.state_dict())
        summarize(model)
        assert model.training and model.ff_policy.mode == "1"
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())

    def test_seed_table(self):
        rows = {row.name: row.seed for row in summarize(create_model("featherface_v2")).components}
        assert rows["pyramid"] == 18_432 and rows["context"] == 12_288 and rows["heads"] == 11_520
        summary = summarize(create_model("featherface_v1_ssh"))
        assert summary.seed is None and all(row.seed is None for row in summary.components)
        assert summary.as_dict()["components"][0] == {
            "name": "backbone",
            "parameters": 213_072,
            "seed": None,
            "flops": summary.components[0].flops,
        }

    def test_rendering(self):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(render(summarize(create_model("featherface_v2"))))
        text = console.export_text()
        assert "256,148" in text and "19,508" in text and "18,432" in text and "868.8" in text


class TestAnchors:
    def test_by_definition(self):
        """biubug6's loop over levels, rows, columns and sizes."""
        height, width = 201, 333
        expected = []
        for step, sizes in zip((8, 16, 32), ((16, 32), (64, 128), (256, 512))):
            for i, j in itertools.product(range(math.ceil(height / step)), range(math.ceil(width / step))):
                for size in sizes:
                    centre = (j + 0.5) * step / width, (i + 0.5) * step / height
                    expected.append([*centre, size / width, size / height])
        assert len(expected) == 2884
        boxes = anchors(height, width)
        assert boxes.dtype == torch.float32
        assert torch.equal(boxes, torch.tensor(expected))

    def test_number(self):
        assert anchors(640, 640).shape == (16_800, 4)
        assert anchors(1, 1).shape == (6, 4)
        assert level_sizes(33, 8) == [(5, 1), (3, 1), (2, 1)]

    def test_errors(self):
        with pytest.raises(ValueError, match="an image of 0 x 5 pixels has none"):
            anchors(0, 5)


class TestForward:
    def test_outputs(self, model):
        bbox, cls, landmarks = model(torch.randn(2, 3, 201, 333))
        assert bbox.shape == (2, 2884, 4) and cls.shape == (2, 2884, 2) and landmarks.shape == (2, 2884, 10)
        torch.testing.assert_close(cls.sum(-1), torch.ones(2, 2884))

    @pytest.mark.parametrize("height,width", [(1, 1), (1, 40), (33, 7), (64, 64)])
    def test_any_size(self, model, height, width):
        assert [y.shape[1] for y in model(torch.randn(1, 3, height, width))] == [len(anchors(height, width))] * 3

    def test_batch_of_zero(self, model):
        n = len(anchors(65, 40))
        assert [tuple(y.shape) for y in model(torch.randn(0, 3, 65, 40))] == [(0, n, 4), (0, n, 2), (0, n, 10)]

    def test_batch_of_zero_in_training(self, name):
        model = create_model(name)
        before = copy.deepcopy(model.state_dict())
        outputs = model(torch.randn(0, 3, 65, 40))
        sum(y.sum() for y in outputs).backward()
        for key, value in model.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(value, before[key]), key

    def test_images_of_a_batch_are_independent(self, model):
        x = torch.randn(3, 3, 50, 70)
        close(model(x), [torch.cat(y) for y in zip(*(model(image[None]) for image in x))], rtol=1e-4, atol=1e-5)

    def test_double(self, model):
        x = torch.randn(1, 3, 70, 90, dtype=torch.float64)
        outputs = copy.deepcopy(model).double()(x)
        assert all(y.dtype == torch.float64 for y in outputs)
        close([y.float() for y in outputs], model(x.float()), rtol=1e-3, atol=1e-4)

    def test_channels_last(self, model):
        x = torch.randn(2, 3, 70, 90)
        fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
        features = fast.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
        close(fast(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)

    def test_order_of_rows(self, model):
        """Row n is level, row, column, anchor: found by moving the bias of one predictor per level and anchor."""
        x = torch.randn(1, 3, 40, 72)
        features = model.forward_features(x)
        assert [tuple(f.shape[2:]) for f in features] == level_sizes(40, 72)
        bbox, cls, landmarks = model(x, logits=True)
        start = 0
        for feature, head in zip(features, model.heads()):
            rows, columns = feature.shape[2:]
            t = feature
            if head.trunk is not None:
                t = F.conv2d(t, head.trunk.weight, padding=1)
                bn = head.trunk_bn
                t = F.batch_norm(t, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()
            for y, conv, k in ((bbox, head.bbox, 4), (cls, head.cls, 2), (landmarks, head.landmarks, 10)):
                raw = F.conv2d(t, conv.weight, conv.bias)
                for i, j, a in itertools.product((0, rows - 1), (0, columns - 1), (0, 1)):
                    n = start + (i * columns + j) * 2 + a
                    torch.testing.assert_close(y[0, n], raw[0, a * k : a * k + k, i, j], rtol=1e-4, atol=1e-5)
            start += rows * columns * 2
        assert start == bbox.shape[1]

    def test_logits(self, name):
        model, x = create_model(name), torch.randn(2, 3, 64, 64)
        model.eval()
        _, probabilities, _ = model(x)
        _, logits, _ = model(x, logits=True)
        torch.testing.assert_close(logits.softmax(-1), probabilities)
        assert torch.equal(model(x, logits=False)[1], probabilities)
        model.train()
        assert not torch.allclose(model(x)[1].sum(-1), torch.ones(()))
        torch.testing.assert_close(model(x, logits=False)[1].sum(-1), torch.ones(2, 168))

    def test_wrong_input(self, model):
        with pytest.raises(ValueError, match=r"the input must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
            model(torch.zeros(1, 1, 8, 8))
        with pytest.raises(ValueError, match=r"got \(3, 8, 8\)"):
            model(torch.zeros(3, 8, 8))

    def test_every_parameter_learns(self, name):
        model = create_model(name)
        outputs = model(torch.randn(2, 3, 96, 96))
        sum(y.square().mean() for y in outputs).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_own_input_is_left_alone(self, name):
        x = torch.randn(1, 3, 64, 64)
        before = x.clone()
        create_model(name)(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("size", ["even", "odd"])
    def test_published_network(self, size, teacher_weights, data_dir):
        reference = np.load(data_dir / "ref" / "v1_ssh.npz")
        model = create_model("featherface_v1_ssh", weights=teacher_weights).eval()
        with torch.no_grad():
            outputs = model(torch.from_numpy(reference[f"{size}_x"]))
        for key, y in zip(("bbox", "cls", "landmarks"), outputs):
            expected = torch.from_numpy(reference[f"{size}_{key}"])
            assert (y - expected).abs().max() < 1e-5 * expected.abs().max(), key

    @pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra"])
    def test_evaluation_agrees_with_training(self, name):
        """Once running statistics have settled on one batch, the modes differ by the n - 1 of running_var alone."""
        torch.manual_seed(0)
        model = randomize(create_model(name))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        x = 60 * torch.randn(24, 3, 320, 320)
        with torch.no_grad():
            training = model(x)
            evaluation = model.eval()(x, logits=True)
        for y, expected in zip(evaluation, training):
            assert (y - expected).abs().max() < 0.02 * expected.abs().max()


class TestDefinition:
    """The models put together again from their parts, as the specification words it."""

    def test_v2(self):
        torch.manual_seed(0)
        m = randomize(create_model("featherface_v2")).eval()
        x = torch.randn(2, 3, 97, 130)
        features = [
            F.relu(m.backbone_cbam_manager(feat, name) + feat)
            for feat, name in zip(m.body(x), ("stage1", "stage2", "stage3"))
        ]
        features = [
            F.relu(m.bifpn_cbam_manager(feat, name) + feat) for feat, name in zip(m.bifpn(features), ("p3", "p4", "p5"))
        ]
        pairs = ((m.ssh1, m.ssh1_cs), (m.ssh2, m.ssh2_cs), (m.ssh3, m.ssh3_cs))
        features = [cs(ssh(feat)) for feat, (ssh, cs) in zip(features, pairs)]
        cls, bbox, landmarks = (
            torch.cat(level, 1) for level in zip(*(head(f) for f, head in zip(features, m.shared_heads)))
        )
        close(m(x), (bbox, F.softmax(cls, -1), landmarks))

    @pytest.mark.parametrize("chosen", [INNOVATIONS, (), *itertools.combinations(INNOVATIONS, 1)])
    def test_ultra(self, chosen):
        torch.manual_seed(0)
        m = randomize(create_model("featherface_v2_ultra", innovations=chosen)).eval()
        x = torch.randn(2, 3, 97, 130)
        shuffle = nn.ChannelShuffle(4)

        raw = m.body(x)
        levels = []
        for c, name in zip(raw, ("stage1", "stage2", "stage3")):
            manager = copy.deepcopy(m.backbone_cbam_manager)
            uses = manager.statistics[name]
            a = c
            for use in uses:
                manager.statistics[name] = nn.ModuleList([use])
                y = manager(a, name)
                a = a + y
            assert len(uses) == (3 if "attention" in chosen else 1)
            levels.append(F.relu(y + c))
        levels = m.bifpn(levels)
        if "reuse" in chosen:
            levels = [
                p + 0.3 * torch.stack([chunk.mean(1) for chunk in c.chunk(32, 1)], 1) for p, c in zip(levels, raw)
            ]
        levels = [m.bifpn_cbam_manager(p, name, residual=True) for p, name in zip(levels, ("p3", "p4", "p5"))]
        if "multiscale" in chosen:

            def to(x, like):
                return F.interpolate(x, tuple(like.shape[2:]), mode="bilinear", align_corners=False, antialias=False)

            p3, p4, p5 = levels
            levels = [p3 + 0.4 * to(p4, p3), p4 + 0.3 * to(p3, p4) + 0.3 * to(p5, p4), p5 + 0.4 * to(p4, p5)]
        features = []
        for i, (p, ssh) in enumerate(zip(levels, (m.ssh1, m.ssh2, m.ssh3))):
            y = ssh(p)
            if "dynamic" in chosen:
                gate = m.dynamic_gate
                t = math.log1p(math.exp(gate.raw_temperature.item())) + 0.1
                g = torch.sigmoid(((gate.weight[i] * p.mean((2, 3))).sum(1) + gate.bias[i]) / t).view(-1, 1, 1, 1)
                y = g * y + (1 - g) * p.clamp(min=0)
            y = shuffle(y)
            if "progressive" in chosen:
                for k in range(3):
                    y = shuffle(y + 0.1 * torch.tanh(y)) * (1 + 0.1 * k)
            features.append(y)
        cls, bbox, landmarks = (
            torch.cat(level, 1) for level in zip(*(head(f) for f, head in zip(features, m.shared_heads)))
        )
        close(m(x), (bbox, F.softmax(cls, -1), landmarks), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["featherface_v1", "featherface_v1_dcn", "featherface_v1_ssh"])
    def test_v1(self, name):
        torch.manual_seed(0)
        m = randomize(create_model(name)).eval()
        x = torch.randn(1, 3, 97, 130)
        levels = m.body(x)
        if name != "featherface_v1_ssh":
            names = ("stage1", "stage2", "stage3")
            levels = [F.relu(m.backbone_cbam_manager(c, n) + c) for c, n in zip(levels, names)]
        levels = m.bifpn(levels)
        if name != "featherface_v1_ssh":
            levels = [F.relu(m.bifpn_cbam_manager(p, n) + p) for p, n in zip(levels, ("p3", "p4", "p5"))]
        outputs = ([], [], [])
        for i, (p, context) in enumerate(zip(levels, (m.ssh1, m.ssh2, m.ssh3))):
            y = context(p)
            b, c, h, w = y.shape
            # The published network exchanges the axes of (C / 2, 2), V1 as the seed words it those of (2, C / 2).
            view = (b, c // 2, 2, h, w) if isinstance(context, SSH_Deformable) else (b, 2, c // 2, h, w)
            y = y.reshape(view).transpose(1, 2).reshape(b, c, h, w)
            for rows, head, k in zip(outputs, (m.BboxHead, m.ClassHead, m.LandmarkHead), (4, 2, 10)):
                rows.append(head[i](y).permute(0, 2, 3, 1).reshape(b, -1, k))
        bbox, cls, landmarks = (torch.cat(rows, 1) for rows in outputs)
        close(m(x), (bbox, F.softmax(cls, -1), landmarks), rtol=1e-4, atol=1e-5)

    def test_deformable_ssh(self):
        torch.manual_seed(0)
        block = randomize(SSH_Deformable(8, 8)).eval()
        x = torch.randn(2, 8, 6, 5)

        def layer(name, x):
            deform, bn, _ = getattr(block, name)
            return bn(deform(x))

        a = F.leaky_relu(layer("conv5X5_1", x), 0.1)
        seven = layer("conv7x7_3", F.leaky_relu(layer("conv7X7_2", a), 0.1))
        expected = torch.cat([layer("conv3X3", x), layer("conv5X5_2", a), seven], 1).relu()
        torch.testing.assert_close(block(x), expected)

    def test_backbone(self):
        body = featherface.models.MobileNetV1()
        assert count(body) == 213_072
        assert [tuple(c.shape) for c in body(torch.randn(2, 3, 65, 40))] == [
            (2, 64, 9, 5),
            (2, 128, 5, 3),
            (2, 256, 3, 2),
        ]
        strides = [m.stride[0] for m in body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert strides == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


class TestUltra:
    def test_parameters_without_dynamic(self):
        model = create_model("featherface_v2_ultra", innovations=("reuse", "attention", "progressive", "multiscale"))
        assert count(model) == 248_036

    @pytest.mark.parametrize("innovation", [i for i in INNOVATIONS if i != "dynamic"])
    def test_other_innovations_have_no_parameters(self, innovation):
        others = [i for i in INNOVATIONS if i != innovation]
        assert count(create_model("featherface_v2_ultra", innovations=others)) == 248_136

    @pytest.mark.parametrize("innovation", INNOVATIONS)
    def test_each_innovation_changes_the_output(self, innovation):
        def run(innovations):
            torch.manual_seed(0)
            model = randomize(create_model("featherface_v2_ultra", innovations=innovations))
            model.load_state_dict(whole, strict=False)
            return model.eval()(60 * torch.randn(1, 3, 64, 64))[0]

        whole = randomize(create_model("featherface_v2_ultra")).state_dict()

        assert not torch.allclose(run(INNOVATIONS), run([i for i in INNOVATIONS if i != innovation]))

    def test_start_of_the_dynamic_gate(self):
        gate = create_model("featherface_v2_ultra").dynamic_gate
        assert not gate.weight.any() and (gate.bias == 2).all()
        torch.testing.assert_close(F.softplus(gate.raw_temperature) + 0.1, torch.tensor(1.0))

    def test_statistics_per_use(self):
        model = create_model("featherface_v2_ultra")
        assert sum(isinstance(m, SpatialStatistics) for m in model.backbone_cbam_manager.modules()) == 9
        assert sum(isinstance(m, SpatialStatistics) for m in model.bifpn_cbam_manager.modules()) == 3
        model(torch.randn(2, 3, 64, 64))
        counts = [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, SpatialStatistics)]
        assert counts == [1] * 12

    def assert_shared(self, m):
        assert m.bifpn_cbam_manager.spatial_gate is m.backbone_cbam_manager.spatial_gate
        assert list(m.bifpn_cbam_manager.channel_gates) == ["shared"]
        for node in ("p4_up", "p3_out", "p4_out", "p5_out"):
            first, second = getattr(m.bifpn[0], node), getattr(m.bifpn[1], node)
            assert first.depthwise.weight is second.depthwise.weight
            assert first.pointwise.weight is second.pointwise.weight
            assert first.bn.weight is not second.bn.weight
            assert first.fusion_weight is not second.fusion_weight
        for layer in ("conv3X3", "conv5X5_1", "conv5X5_2", "conv7X7_2", "conv7x7_3"):
            blocks = [getattr(ssh, layer) for ssh in (m.ssh1, m.ssh2, m.ssh3)]
            assert len({id(block[0].weight) for block in blocks}) == 1
            assert len({id(block[1].weight) for block in blocks}) == 3
        for layer in ("cls_head", "bbox_head", "landmark_head"):
            assert len({id(getattr(head, layer).weight) for head in m.shared_heads}) == 1
        assert len({id(head.shared_conv[0].weight) for head in m.shared_heads}) == 3

    def test_sharing_survives(self):
        model = create_model("featherface_v2_ultra")
        self.assert_shared(model)
        self.assert_shared(copy.deepcopy(model))
        self.assert_shared(pickle.loads(pickle.dumps(model)))
        self.assert_shared(copy.deepcopy(model).double().half().to(memory_format=torch.channels_last))
        other = create_model("featherface_v2_ultra")
        other.load_state_dict(model.state_dict())
        self.assert_shared(other)
        assigned = copy.deepcopy(model)
        assigned.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
        self.assert_shared(assigned)
        self.assert_shared(create_model("featherface_v2_ultra").to("meta").to_empty(device="cpu"))

    def test_training_keeps_sharing(self):
        model = create_model("featherface_v2_ultra")
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
        self.assert_shared(model)
        assert count(model) == 248_136

    def test_unknown_innovation(self):
        with pytest.raises(FeatherFaceError, match="unknown innovations magic; choose from: reuse, attention"):
            create_model("featherface_v2_ultra", innovations=("reuse", "magic"))


class TestInitialisation:
    def test_fusion_weights_are_one(self, name):
        weights = [p for key, p in create_model(name).named_parameters() if key.endswith("fusion_weight")]
        assert len(weights) == 8 and all((w == 1).all() for w in weights)

    def test_offsets_start_at_zero(self, name):
        layers = [m for m in create_model(name).modules() if isinstance(m, DeformConv)]
        assert len(layers) == {"featherface_v1_dcn": 3, "featherface_v1_ssh": 15}.get(name, 0)
        for layer in layers:
            assert not any(p.any() for p in (*layer.offset_conv.parameters(), *layer.modulator_conv.parameters()))

    def test_batch_norm_is_the_identity(self, name):
        for module in create_model(name).modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all() and not module.bias.any()

    def test_first_layers_of_channel_mlps_are_not_negative(self, name):
        weights = [p for key, p in create_model(name).named_parameters() if key.endswith("fc1.weight")]
        assert all((w >= 0).all() and w.any() for w in weights)

    def test_seed_decides(self, name):
        def weights():
            torch.manual_seed(3)
            return create_model(name).state_dict()

        first, second = weights(), weights()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


class TestModule:
    def test_attribute_names(self, name):
        names = {key for key, _ in create_model(name).named_children()}
        expected = {"body", "bifpn", "ssh1", "ssh2", "ssh3", "ssh1_cs", "ssh2_cs", "ssh3_cs"}
        if name != "featherface_v1_ssh":
            expected |= {"backbone_cbam_manager", "bifpn_cbam_manager"}
        expected |= {"shared_heads"} if "v2" in name else {"ClassHead", "BboxHead", "LandmarkHead"}
        assert names - {"dynamic_gate"} == expected

    def test_seed_classes(self):
        for name in ("SSH_Grouped", "ChannelShuffle_Light", "SharedCBAMManager", "CBAM_Plus", "BiFPN_Light"):
            assert name in featherface.models.__all__
        assert featherface.models.ChannelShuffle_Light(32, groups=4)(torch.randn(1, 32, 2, 2)).shape == (1, 32, 2, 2)
        with pytest.raises(ValueError, match="groups=5 does not divide 32 channels"):
            featherface.models.ChannelShuffle_Light(32, groups=5)

    def test_state_dict_round_trip(self, name, model):
        other = create_model(name).eval()
        other.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 64, 64)
        close(other(x), model(x), rtol=0, atol=0)

    def test_copies(self, model):
        x = torch.randn(1, 3, 64, 64)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(other(x), model(x), rtol=0, atol=0)
            assert other.name == model.name

    def test_repr(self, model):
        text = repr(model)
        assert type(model).__name__ in text and "DepthwiseSeparable" in text and "ChannelShuffle_Light" in text

    def test_policy(self, name):
        def policies(model):
            return {m.ff_policy for m in model.modules() if isinstance(m, FusedModule)}

        assert policies(create_model(name, fused=False)) == {Policy("0", "auto")}
        assert policies(create_model(name, fused=True)) == {Policy("1", "auto")}
        assert policies(create_model(name, fused=Policy("1", "reference"))) == {Policy("1", "reference")}

    def test_fused_and_plain_agree(self, name, model):
        fused = create_model(name, fused=True).eval()
        fused.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 70, 90)
        close(fused(x), model(x), rtol=1e-4, atol=1e-5)


class TestCreate:
    def test_names(self):
        assert list_models() == list(PARAMETERS)
        assert all(create_model(name).name == name for name in list_models())

    def test_unknown_name(self):
        with pytest.raises(FeatherFaceError, match=r"no model 'featherface_v3'; choose from: featherface_v1, .*ultra"):
            create_model("featherface_v3")

    def test_unknown_option(self):
        with pytest.raises(FeatherFaceError, match="featherface_v2 has no option width; it has none"):
            create_model("featherface_v2", width=3)
        with pytest.raises(FeatherFaceError, match="has no option width; its options are: innovations"):
            create_model("featherface_v2_ultra", width=3)

    def test_sources_of_weights_exclude_each_other(self):
        with pytest.raises(FeatherFaceError, match="exclude each other"):
            create_model("featherface_v2", weights="a.pth", backbone_weights="b.pth")


class TestPrecision:
    @pytest.mark.parametrize("training", [True, False])
    def test_autocast(self, name, training):
        model, x = create_model(name).train(training), torch.randn(2, 3, 96, 96)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        sum(y.float().square().mean() for y in outputs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert all(y.isfinite().all() for y in outputs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, model, dtype):
        x = torch.randn(1, 3, 64, 64)
        outputs = copy.deepcopy(model).to(dtype)(x.to(dtype))
        for y, expected in zip(outputs, model(x)):
            assert y.dtype == dtype
            assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name,inputs", [("featherface_v2", 64), ("featherface_v1_ssh", 32)])
def test_report_lists_just_the_ops_that_run(name, inputs):
    import ffkernels

    model = create_model(name, fused=True)
    expected = ffkernels.report(model)
    observed = ffkernels.report(model, torch.zeros(1, 3, inputs, inputs))
    assert {(r.op, r.backend) for r in expected} == {(r.op, r.backend) for r in observed}
    assert {r.layer for r in expected if r.op == "conv_chain"} == {"body.stage1", "body.stage2", "body.stage3"}
