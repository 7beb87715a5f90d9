"""Configuration -> module, and the folding of batch normalisation that deployment wants."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.cp_mobile import CPMobile

Model = AudioMamba | CPMobile


def build_model(config: AudioMambaConfig | CPMobileConfig) -> Model:
    """A freshly initialised model of the given configuration."""
    return AudioMamba(config) if isinstance(config, AudioMambaConfig) else CPMobile(config)


def folded_config(config: AudioMambaConfig | CPMobileConfig) -> AudioMambaConfig | CPMobileConfig:
    """Of a model whose batch normalisation has been folded."""
    if isinstance(config, CPMobileConfig):
        return config.model_copy(update={"folded": True})
    changes = {}
    if config.stem.kind == "conv":
        changes["stem"] = config.stem.model_copy(update={"folded": True})
    if config.head == "batch_norm":
        changes["head"] = "linear"
    return config.model_copy(update=changes)


def fold_batch_norm(model: Model) -> Model:
    """A copy in evaluation mode whose batch normalisations are folded into the convolutions, or the head, before them.

    It computes the same logits in evaluation mode with 3 values a channel less to store. A model without batch
    normalisation comes back as an equal copy.
    """
    folded = build_model(folded_config(model.config))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in dict(folded.named_parameters())}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        for place in range(len(module) - 1):
            convolution, norm = module[place], module[place + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                weight, bias = fuse_conv_bn_weights(
                    convolution.weight,
                    convolution.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                state[f"{name}.{place}.weight"], state[f"{name}.{place}.bias"] = weight, bias
    if isinstance(model, AudioMamba) and model.head_norm is not None:
        norm = model.head_norm
        state["head.weight"], state["head.bias"] = fuse_linear_bn_weights(
            model.head.weight, model.head.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    folded.load_state_dict({name: tensor.detach().to(torch.float32) for name, tensor in state.items()})
    return folded.eval()
