"""Quantisation-aware training: what is validated is what ships, ranges freeze, killed runs go on as they would have."""

import pytest
import torch
from test_train import SPEC, model, parts, same, train  # noqa: F401 (a fixture)

from aum_compress.compress.quantize import prepare
from aum_compress.errors import AumError
from aum_compress.models.fake_quantized import FakeQuantize, converted
from aum_compress.models.quantized import QuantizedLayer
from aum_compress.recipe_schema import QuantizeSection
from aum_compress.train import fit as fit_module
from aum_compress.train import module as training_module

SECTION = QuantizeSection(layers={"layers.0.mixer.in_proj": "int4-weight"})


def fake(parts):  # noqa: F811
    batch = torch.from_numpy(parts.train[:16])[:, None]
    return prepare(model(parts), [(batch - SPEC.mean) / SPEC.std], SECTION)


def qat(parts, folder, epochs=2, frozen=1, **settings):  # noqa: F811
    return train(
        parts,
        folder,
        epochs=epochs,
        net=fake(parts),
        teach={"frozen_epochs": frozen},
        learning_rate=3e-3,
        **settings,
    )


def ranges(net):
    return [float(m.high) for m in net.modules() if isinstance(m, FakeQuantize)]


def test_the_converted_model_is_what_is_validated(parts, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def spy(net):
        made = converted(net)
        seen.append((made, made.register_forward_hook(lambda module, inputs, output: calls.append(module))))
        return made

    calls = []
    monkeypatch.setattr(training_module, "converted", spy)
    before = fake(parts)
    net, result = qat(parts, tmp_path)
    assert len(seen) == 2
    assert set(calls) == {made for made, _ in seen}
    assert all(isinstance(made.head, QuantizedLayer) for made in calls)
    assert result.validation_accuracy is not None
    assert not same(before, net), "it has learned something"
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"] if "valid" in name]


def test_ranges_move_until_they_are_frozen(parts, tmp_path):  # noqa: F811
    before = ranges(fake(parts))
    assert ranges(qat(parts, tmp_path / "frozen", epochs=1, frozen=1)[0]) == before
    assert ranges(qat(parts, tmp_path / "free", epochs=1, frozen=0)[0]) != before


def test_averaged_weights_are_quantised_too(parts, tmp_path):  # noqa: F811
    net, _ = qat(parts, tmp_path, epochs=1, frozen=0, weight_average=0.9)
    assert torch.isfinite(converted(net)(torch.zeros(1, *SPEC.feature_shape))).all()


def test_a_killed_training_goes_on_as_if_it_had_not_been(parts, tmp_path, monkeypatch):  # noqa: F811
    whole, result = qat(parts, tmp_path / "whole", epochs=3)

    class Killed(Exception):
        pass

    original = fit_module._History.on_train_epoch_start

    def kill(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise Killed
        original(self, trainer, pl_module)

    monkeypatch.setattr(fit_module._History, "on_train_epoch_start", kill)
    with pytest.raises(Killed):
        qat(parts, tmp_path / "killed", epochs=3)
    monkeypatch.undo()
    again, resumed = qat(parts, tmp_path / "killed", epochs=3)
    assert resumed.history == result.history
    assert same(whole, again)


def test_a_training_that_diverges_says_so(parts, tmp_path):  # noqa: F811
    with pytest.raises(AumError, match="diverged|not finite"):
        train(
            parts,
            tmp_path,
            net=fake(parts),
            teach={"frozen_epochs": 0},
            learning_rate=1e30,
            gradient_clip=None,
            warmup_epochs=0,
        )
