import json

import pytest
import torch
import torch.nn.functional as F
import torchinfo
from pydantic import ValidationError
from tiny import LABELS, N_FRAMES, N_MELS, aum_config, cp_config, features, student_config, trained_like

from aum_compress.budget.analytic import analytic_macs
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem, PatchStem
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.norm import RMSNorm
from aum_compress.models.presets import PRESETS
from aum_compress.models.scan import selective_scan_oracle


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_cp_mobile_is_the_baseline_network():
    model = build_model(PRESETS["cp-mobile"](256, 65, 10))
    assert parameters(model) == 61_148
    assert torchinfo.summary(model, input_size=(1, 1, 256, 65), verbose=0).total_mult_adds == 29_419_156


@pytest.mark.parametrize(
    ("preset", "size", "macs"), [("aum-small", 25_539_215, 13_798_999_680), ("aum-base", 92_107_535, 48_702_934_272)]
)
def test_aum_has_the_published_size(preset, size, macs):
    config = PRESETS[preset](128, 1024, 527)
    with torch.device("meta"):
        model = build_model(config)
    assert parameters(model) == size  # published: 25.5 M and 92.1 M
    assert config.n_tokens == 513
    assert sum(analytic_macs(config).values()) == macs


def test_published_checkpoint_names():
    names = set(build_model(aum_config()).state_dict())
    mixer = "layers.0.mixer."
    assert {"cls_token", "pos_embed.pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} <= names
    assert {"norm_f.weight", "head.weight", "head.bias", "layers.0.norm.weight"} <= names
    assert {
        mixer + n for n in ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.bias", "A_log", "D")
    } <= names
    assert {mixer + n for n in ("conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "A_b_log", "D_b")} <= names


@pytest.mark.parametrize(
    "config",
    [
        student_config(),
        student_config(block_type="none"),
        student_config(block_type="v1"),
        student_config(token="cell"),
        aum_config(),
        cp_config(),
    ],
)
def test_logits_and_gradients(config):
    model = build_model(config)
    logits = model(features(3))
    assert logits.shape == (3, len(LABELS))
    logits.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


def test_token_counts():
    assert student_config().n_tokens == N_FRAMES
    assert aum_config().n_tokens == (N_MELS // 8) * (N_FRAMES // 8) + 1
    assert build_model(aum_config()).embed(features(2)).shape == (2, aum_config().n_tokens, 16)


def test_class_token_stands_in_the_middle_and_its_position_first():
    model = build_model(aum_config())
    with torch.no_grad():
        model.cls_token.fill_(1.0)
        model.pos_embed.pos_embed.zero_()
        model.pos_embed.pos_embed[0, 0] = 100.0
    tokens = model.embed(features(1))
    found = (tokens[0] == 101.0).all(1).nonzero().flatten().tolist()
    assert found == [(tokens.shape[1] - 1) // 2]


def test_patch_tokens_are_frequency_major():
    model = build_model(aum_config())
    x = features(1)
    patches = model.patch_embed(x)
    columns = N_FRAMES // 8
    lower_row = model.patch_embed.proj(x[:, :, 8:16])[0, :, 0]
    torch.testing.assert_close(patches[0, columns : 2 * columns], lower_row.T)


def test_mixer_halves_the_sum_of_two_independent_directions():
    torch.manual_seed(0)
    mixer = MambaMixer(16, student_config().blocks[0], 40)
    tokens = torch.randn(2, 9, 16)
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    forward = scan_direction(mixer, x, z, "")
    backward = scan_direction(mixer, x.flip(-1), z.flip(-1), "_b").flip(-1)
    torch.testing.assert_close(mixer(tokens), mixer.out_proj(((forward + backward) / 2).transpose(1, 2)))


def test_v1_shares_all_but_the_state_matrix_and_adds_both_scans_whole():
    torch.manual_seed(0)
    mixer = MambaMixer(16, student_config(block_type="v1").blocks[0], 40)
    assert [name for name in mixer.state_dict() if "_b" in name] == ["A_b_log"]
    tokens = torch.randn(2, 9, 16)
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    u = F.silu(mixer.conv1d(F.pad(x, (3, 0))))  # causal for both scans
    dt, b, c = mixer.x_proj(u.transpose(1, 2)).transpose(1, 2).split([2, 4, 4], dim=1)
    delta = (mixer.dt_proj.weight @ dt) + mixer.dt_proj.bias[:, None]
    with torch.no_grad():
        mixer.A_b_log.add_(0.3)
    y = torch.zeros(())
    for turn, log in ((lambda t: t, mixer.A_log), (lambda t: t.flip(-1), mixer.A_b_log)):
        inputs = [turn(t) for t in (u, delta, b, c, z)]
        y = y + turn(selective_scan_oracle(*inputs[:2], -log.exp(), *inputs[2:4], mixer.D, inputs[4], None, True))
    torch.testing.assert_close(mixer(tokens), mixer.out_proj(y.transpose(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("directions", "block_type"), [(1, "none"), (2, "v2")])
def test_cards_that_count_directions_are_read_as_they_were_meant(directions, block_type):
    card = json.loads(student_config().model_dump_json())
    for block in card["blocks"]:
        del block["block_type"]
        block["directions"] = directions
    config = AudioMambaConfig.model_validate_json(json.dumps(card))
    assert {block.block_type for block in config.blocks} == {block_type}
    with pytest.raises(ValidationError, match="directions"):
        BlockConfig(d_inner=8, d_state=4, dt_rank=1, directions=3)


def scan_direction(mixer: MambaMixer, x: torch.Tensor, z: torch.Tensor, suffix: str) -> torch.Tensor:
    """One direction by itself; all (B,D,L)."""
    u, delta, b, c = mixer.scan_inputs(x, suffix)
    rates = -getattr(mixer, f"A{suffix}_log").exp()
    return selective_scan_oracle(u, delta, rates, b, c, getattr(mixer, f"D{suffix}"), z, delta_softplus=True)


def test_backward_direction_is_causal_from_the_end():
    mixer = MambaMixer(16, student_config().blocks[0], 40)
    x, z = torch.randn(1, 24, 8), torch.randn(1, 24, 8)
    changed = x.clone()
    changed[..., 0] += 1
    before = scan_direction(mixer, x.flip(-1), z.flip(-1), "_b").flip(-1)
    after = scan_direction(mixer, changed.flip(-1), z.flip(-1), "_b").flip(-1)
    torch.testing.assert_close(before[..., 1:], after[..., 1:])
    assert not torch.allclose(before[..., 0], after[..., 0])


def test_mixer_scans_as_the_oracle_does(monkeypatch):
    mixer = MambaMixer(16, student_config().blocks[0], 40)
    tokens = torch.randn(2, 9, 16)
    found = mixer(tokens)
    monkeypatch.setattr("aum_compress.models.scan.selective_scan", selective_scan_oracle)
    torch.testing.assert_close(found, mixer(tokens), rtol=1e-4, atol=1e-5)


def test_mlp_head_is_norm_hidden_and_classes_with_dropout_in_training_alone():
    config = student_config().model_copy(update={"head": "mlp"})
    head = build_model(config).eval().head
    assert sum(p.numel() for p in head.parameters()) == 2 * 16 + 16 * 512 + 512 + 512 * 3 + 3
    pooled = 3 * torch.randn(4, 16) + 1
    hidden = F.relu(F.layer_norm(pooled, (16,)) @ head.hidden.weight.T + head.hidden.bias)
    wanted = hidden @ head.classes.weight.T + head.classes.bias
    torch.testing.assert_close(head(pooled), wanted)
    assert not torch.allclose(head.train()(pooled), wanted)


@pytest.mark.parametrize("block_type", ["none", "v1", "v2"])
def test_activation_checkpointing_changes_no_gradient(block_type):
    config = student_config(block_type=block_type).model_copy(update={"position": "rope"})
    model = build_model(config).train()
    runs = []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for checkpointed, wanted_runs in ((False, 1), (True, 2)):
        model.activation_checkpointing = checkpointed
        model.zero_grad()
        runs.clear()
        model(features()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert len(runs) == wanted_runs * len(model.layers)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-6, atol=1e-7)


def test_batch_norm_head_normalises_the_logits_of_tokens_and_averages_them():
    model = build_model(student_config(token="cell").model_copy(update=BATCH_NORM_HEAD)).train()
    x = features()
    tokens = model.embed(x)
    grid = model.config.token_grid
    for block in model.layers:
        tokens = block(tokens, grid)
    logits = model.head(model.norm_f(tokens))  # (B,L,C)
    mean, variance = logits.mean((0, 1)), logits.var((0, 1), unbiased=False)
    wanted = ((logits - mean) / (variance + 1e-5).sqrt()).mean(1)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="head batch_norm: reads every token"):
        AudioMambaConfig.model_validate(dict(aum_config()) | {"head": "batch_norm", "pool": "class_token"})


def test_rms_norm_and_its_gradient_are_the_definition():
    norm = RMSNorm(6).double()
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), wanted)
    grad = torch.randn_like(wanted)
    found, own = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (norm(x), wanted))
    torch.testing.assert_close(found, own)


def test_rms_norm():
    norm = RMSNorm(8)
    x = torch.randn(3, 8) * 5
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-5))


BATCH_NORM_HEAD = {"head": "batch_norm", "pool": "mean"}


@pytest.mark.parametrize(
    "config",
    [
        student_config(),
        student_config(token="cell"),
        student_config(token="cell").model_copy(update=BATCH_NORM_HEAD),
        aum_config().model_copy(update=BATCH_NORM_HEAD),
        cp_config(),
    ],
)
def test_folding_batch_norm_changes_nothing_but_the_size(config):
    model = trained_like(config)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(features()), model(features()), rtol=1e-4, atol=1e-5)
    assert not any("running" in name for name in folded.state_dict())
    assert len(folded.state_dict()) < len(model.state_dict())
    again = fold_batch_norm(folded)
    torch.testing.assert_close(again(features()), folded(features()))


def test_stem_that_leaves_no_token_is_refused():
    with pytest.raises(ValidationError, match="leaves a 0 x 1 grid"):
        AudioMambaConfig.model_validate(dict(student_config()) | {"stem": PatchStem(patch_mels=64, patch_frames=16)})


def test_first_conv_stage_has_to_be_plain():
    with pytest.raises(ValidationError, match="expansion must be 0"):
        ConvStem(stages=(ConvStage(channels=8),))


def test_mean_subtraction_takes_off_its_share_of_what_a_microphone_adds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, N_MELS, N_FRAMES, generator=generator)
    response = torch.randn(1, 1, N_MELS, 1, generator=generator)
    plain = trained_like(student_config())
    halved, whole = (build_model(plain.config.model_copy(update={"mean_subtraction": share})) for share in (0.5, 1))
    for model in (halved, whole):
        model.load_state_dict(plain.state_dict())
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(x + response), whole(x))
        torch.testing.assert_close(halved(x + response), plain(x - 0.5 * x.mean(3, keepdim=True) + 0.5 * response))
        assert (plain(x + response) - plain(x)).abs().max() > 1e-3
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        AudioMambaConfig.model_validate(student_config().model_dump() | {"mean_subtraction": 1.5})
