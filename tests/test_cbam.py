import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_norm, tensor
from torch.nn import functional as F

import ffkernels
from featherface.models import CBAM_Plus, SharedCBAMManager
from featherface.models.attention import CBAM, SpatialGate
from ffkernels import ChannelMLP


def mlp(width, hidden, bias=False):
    return ChannelMLP(
        tensor(hidden, width), tensor(hidden) if bias else None, tensor(width, hidden), tensor(width) if bias else None
    )


def layers(width=4, groups=2, repeats=1, bias=False, training=True):
    return mlp(width, 2, bias), conv(groups, 2 * groups, 7, groups), [norm(groups, training) for _ in range(repeats)]


def once(x, gate, spatial, bn, order):
    """One application, chunk by chunk and group by group; bn is a stock layer."""
    batch, channels = x.shape[:2]
    width, groups = gate.fc1_weight.shape[1], spatial.groups
    zeros = torch.zeros(1, dtype=x.dtype)
    factors = torch.zeros(batch, channels, dtype=x.dtype)
    for start in range(0, channels, width):
        chunk = x[:, start : start + width].reshape(batch, width, -1)
        for pooled in (chunk.sum(2) / chunk.shape[2], chunk.max(2).values):
            hidden = (pooled @ gate.fc1_weight.T + (zeros if gate.fc1_bias is None else gate.fc1_bias)).clamp(min=0)
            logit = hidden @ gate.fc2_weight.T + (zeros if gate.fc2_bias is None else gate.fc2_bias)
            factors[:, start : start + width] += logit
    x = x / (1 + torch.exp(-factors))[:, :, None, None]
    gates = []
    for g, group in enumerate(x.chunk(groups, 1)):
        maps = [group.sum(1, keepdim=True) / group.shape[1], group.max(1, keepdim=True).values]
        maps = torch.cat(maps if order == "mean_max" else maps[::-1], 1)
        gates.append(F.conv2d(maps, spatial.weight[g : g + 1], padding=3))
    gates = bn(torch.cat(gates, 1)).sigmoid()
    return torch.cat([group * gates[:, g : g + 1] for g, group in enumerate(x.chunk(groups, 1))], 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(
    "channels,width,groups,bias,order",
    [(8, 4, 2, False, "mean_max"), (12, 4, 4, False, "mean_max"), (6, 6, 1, True, "max_mean")],
)
def test_by_definition(channels, width, groups, bias, order, repeats, residual, training):
    x = tensor(3, channels, 5, 4)
    gate, spatial, bns = layers(width, groups, repeats, bias, training)
    stock = [stock_norm(bn) for bn in bns]
    state = x
    for i, bn in enumerate(stock):
        y = once(state, gate, spatial, bn, order)
        if i + 1 < repeats:
            state = state + y
    expected = (y + x).clamp(min=0) if residual else y
    result = ffkernels.cbam(x, gate, spatial, bns, order, residual)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
    for bn, layer in zip(bns, stock):
        same_statistics(bn, layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("repeats,residual", [(1, False), (1, True), (3, True)])
def test_gradients(repeats, residual, training):
    x, params = tensor(2, 4, 2, 3), layers(2, 2, repeats, True, training)
    check_gradients(lambda: ffkernels.cbam(x, *params, residual=residual), x, params)


def test_equal_maxima_share_their_gradient():
    x = torch.full((1, 2, 2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    gate, spatial, bns = layers(2, 1, training=False)
    grad = torch.autograd.grad(ffkernels.cbam(x, gate, spatial, bns)[0, :, 0, 0].sum(), x)[0]
    swapped = torch.autograd.grad(ffkernels.cbam(x.flip(3), gate, spatial, bns)[0, :, 0, 0].sum(), x)[0]
    # Were one pixel of the channel the maximum, flipping the image would not merely flip the gradient.
    torch.testing.assert_close(grad.flip(3), swapped)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1), (2, 8, 5, 1)])
def test_shapes_and_formats(shape, form):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=form)
    for repeats in (1, 3):
        y = ffkernels.cbam(x, *layers(repeats=repeats, training=False), residual=True)
        assert y.shape == shape
        assert y.numel() == 0 or y.is_contiguous(memory_format=form)


def test_nan_passes():
    x = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
    x[0, 1, 1, 1] = float("nan")
    assert ffkernels.cbam(x, *layers(training=False), residual=True).isnan().all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": tensor(1, 6, 3, 3)}, "the 6 channels of x are not a multiple of the MLP's width, 4"),
        ({"channel_mlp": mlp(4, 2)._replace(fc2_weight=tensor(2, 4))}, r"channel_mlp.fc2_weight must be \(4, 2\)"),
        ({"channel_mlp": mlp(4, 2)._replace(fc1_bias=tensor(3))}, r"channel_mlp.fc1_bias must be \(2,\), got \(3,\)"),
        ({"spatial": conv(3, 6, 7, 3), "spatial_bn": [norm(3)]}, "8 channels of x are not a multiple of the 3 spatial"),
        ({"spatial": conv(4, 4, 7, 2)}, "spatial must map 2 G to G channels"),
        ({"spatial": conv(2, 4, 7, 2)._replace(padding=2)}, "keep the size"),
        ({"spatial_bn": []}, "spatial_bn is empty"),
        ({"spatial_bn": [norm(2), norm(3)]}, r"spatial_bn\[1\].weight must be \(2,\)"),
        ({"spatial_order": "min_max"}, "unknown spatial_order 'min_max'"),
    ],
)
def test_errors(change, message):
    gate, spatial, bns = layers()
    arguments = {"x": tensor(1, 8, 3, 3), "channel_mlp": gate, "spatial": spatial, "spatial_bn": bns}
    with pytest.raises(ValueError, match=f"cbam: .*{message}"):
        ffkernels.cbam(**{**arguments, **change})


class TestModules:
    def test_different_widths_share_one_mlp_of_the_smallest(self):
        manager = SharedCBAMManager({"stage1": 64, "stage2": 128, "stage3": 256})
        assert sum(p.numel() for p in manager.parameters()) == 256 + 400
        assert manager.channel_gates["shared"].fc1.weight.shape == (2, 64)

    def test_equal_widths_have_an_mlp_each(self):
        manager = SharedCBAMManager(dict.fromkeys(("p3", "p4", "p5"), 32))
        assert sum(p.numel() for p in manager.parameters()) == 3 * 64 + 400

    def test_share_overrides_the_rule(self):
        assert sum(p.numel() for p in SharedCBAMManager({"a": 32, "b": 32}, share=True).parameters()) == 64 + 400
        separate = SharedCBAMManager({"a": 32, "b": 64}, share=False)
        assert sum(p.numel() for p in separate.parameters()) == 64 + 256 + 400

    def test_reduction_ratio(self):
        manager = SharedCBAMManager({"a": 64, "b": 128}, reduction_ratio=16)
        assert manager.channel_gates["shared"].fc1.weight.shape == (4, 64)

    def test_every_use_has_statistics_of_its_own(self):
        manager = SharedCBAMManager({"a": 8, "b": 16}, repeats=3)
        x = torch.randn(2, 8, 4, 4)
        manager(x, "a")
        uses = manager.statistics
        assert [int(s.num_batches_tracked) for s in uses["a"]] == [1, 1, 1]
        assert [int(s.num_batches_tracked) for s in uses["b"]] == [0, 0, 0]
        assert not torch.equal(uses["a"][0].running_mean, uses["a"][1].running_mean)
        manager.eval()(x, "a")
        assert int(uses["a"][0].num_batches_tracked) == 1

    def test_spatial_gate_can_be_frozen(self):
        manager = SharedCBAMManager({"a": 8, "b": 16})
        manager.spatial_gate.bn.eval()
        manager(torch.randn(2, 8, 4, 4), "a")
        assert int(manager.statistics["a"][0].num_batches_tracked) == 0

    def test_reset_running_stats(self):
        manager = SharedCBAMManager({"a": 8, "b": 16})
        manager(torch.randn(2, 8, 4, 4), "a")
        use = manager.statistics["a"][0]
        use.reset_running_stats()
        assert use.running_mean.abs().max() == 0 and (use.running_var == 1).all() and use.num_batches_tracked == 0

    def test_one_level_alone_is_the_manager_of_one_level(self):
        block, manager = CBAM_Plus(32), SharedCBAMManager({"level": 32})
        block.load_state_dict(manager.state_dict())
        x = torch.randn(2, 32, 5, 5)
        assert torch.equal(block(x), manager(x, "level"))
        assert torch.equal(block.eval()(x, residual=True), F.relu(block(x) + x))

    def test_seed_and_manager_residual_agree(self):
        manager = SharedCBAMManager({"stage1": 64, "stage2": 128}).eval()
        x = torch.randn(1, 128, 3, 3)
        assert torch.equal(manager(x, "stage2", residual=True), F.relu(manager(x, "stage2") + x))

    def test_managers_share_a_spatial_gate(self):
        first = SharedCBAMManager({"a": 8})
        second = SharedCBAMManager({"b": 8}, spatial_gate=first.spatial_gate)
        assert second.spatial_gate is first.spatial_gate

    def test_first_layers_of_mlps_start_from_nonnegative_weights(self):
        gates = [*SharedCBAMManager({"a": 64, "b": 128}).channel_gates.values(), CBAM(256).channel_gate]
        assert all((gate.fc1.weight >= 0).all() and (gate.fc2.weight < 0).any() for gate in gates)

    def test_errors(self):
        with pytest.raises(ValueError, match="no level 'p6', it has: a, b"):
            SharedCBAMManager({"a": 8, "b": 8})(torch.zeros(1, 8, 2, 2), "p6")
        with pytest.raises(ValueError, match=r"channels \[64, 100\] must be multiples of the smallest, 64"):
            SharedCBAMManager({"a": 64, "b": 100})
        with pytest.raises(ValueError, match=r"channels \[6\] must be multiples of 4"):
            SharedCBAMManager({"a": 6})

    @pytest.mark.parametrize("channels,parameters", [(64, 193), (128, 642), (256, 2821), (74, 223)])
    def test_v1_attention(self, channels, parameters):
        block = CBAM(channels)
        assert sum(p.numel() for p in block.parameters()) == parameters + 98 + 2
        x = torch.randn(2, channels, 4, 5)
        stock = torch.nn.BatchNorm2d(1)
        expected = once(x, block.channel_gate.params(), ffkernels.ConvParams.of(block.spatial_conv), stock, "max_mean")
        torch.testing.assert_close(block(x), expected)

    def test_spatial_gate_has_the_parameters_of_the_specification(self):
        assert sum(p.numel() for p in SpatialGate().parameters()) == 392 + 8
