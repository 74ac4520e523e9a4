"""What is known of a model before anything is loaded: architecture, sizes, context, chat template.

It reads `config.json`, the headers of the weights' files and, where asked, the tokenizer; never the weights. A model
named by a hub id is asked for there, its small files only. transformers is imported by the checks that need it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.adapter_folder import is_adapter, tokenizer_source
from trainers.errors import Problem, UserError
from trainers.model_folder import ModelFolder, has_weights, read_json

_EMBEDDING = re.compile(r"embed|^w[tp]e$")  # layers of two dimensions that look tokens or places up


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The sizes of a causal language model. None: the config does not say, or the weights are not here yet."""

    name: str
    config: Mapping[str, Any]
    parameters: int | None

    def size(self, *names: str) -> int | None:
        """The first of these keys that the config has, as an integer."""
        return next((int(self.config[name]) for name in names if isinstance(self.config.get(name), int)), None)

    @property
    def layers(self) -> int | None:
        """Transformer layers."""
        return self.size("num_hidden_layers", "n_layer")

    @property
    def hidden(self) -> int | None:
        """Width of the residual stream."""
        return self.size("hidden_size", "n_embd")

    @property
    def kv_width(self) -> int | None:
        """Numbers that one token's keys hold in one layer: key-value heads × head dimension."""
        heads = self.size("num_attention_heads", "n_head")
        if heads is None or self.hidden is None:
            return None
        return (self.size("num_key_value_heads") or heads) * (self.size("head_dim") or self.hidden // heads)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the output layer knows."""
        return self.size("vocab_size")

    @property
    def experts(self) -> int | None:
        """Experts of a layer, in a mixture."""
        return self.size("num_experts", "num_local_experts", "n_routed_experts")

    @property
    def context(self) -> int | None:
        """Longest sequence, in tokens."""
        return self.size("max_position_embeddings", "n_positions")


def read_model(name: str, *, where: str) -> ModelInfo:
    """The causal language model of a folder or a hub id; UserError with `where` if it is not one, with what it is."""
    model = _read_folder(name, where)
    problems = [Problem(where, message) for message in _architecture_problems(name, model)]
    folder = Path(name)
    if folder.is_dir() and not has_weights(folder):
        problems.append(Problem(where, f"{name} has no weights (*.safetensors); was it saved with save_pretrained?"))
    if problems:
        raise UserError(problems)
    return ModelInfo(name=name, config=model.sizes, parameters=count_parameters(folder, where=where))


def _read_folder(name: str, where: str) -> ModelFolder:
    """Also of a model on the hub, whose config.json is fetched."""
    folder = Path(name)
    try:
        if not folder.exists():
            if folder.is_absolute():
                raise ValueError(f"no such folder: {name}")
            file = _from_hub(name, where)
            return ModelFolder(folder, read_json(file))
        if not folder.is_dir():
            raise ValueError(f"{name} is a file; give the folder of a model")
        if is_adapter(folder):
            raise ValueError(f"{name} is a PEFT adapter, not a complete model; merge it into its base first")
        return ModelFolder.read(folder)
    except UserError:
        raise
    except ValueError as error:
        raise UserError([Problem(where, str(error))]) from error


def _from_hub(name: str, where: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            [Problem(where, f"no such folder, and no model of that name on the hub: {name} ({reason})")]
        ) from (error)


def _architecture_problems(name: str, model: ModelFolder) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if model.architectures:
        if set(model.architectures) & set(CAUSAL.values()):
            return []
        kind = ", ".join(model.architectures)
    elif model.config.get("model_type") in CAUSAL:
        return []
    else:
        kind = f"model of type {model.config.get('model_type', 'unknown')}"
    return [f"{name} is a {kind}, not a causal language model; give one that writes text (…ForCausalLM)"]


def count_parameters(folder: Path, *, where: str) -> int | None:
    """Numbers in the safetensors files of a folder, from their headers; None where there are none."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError([Problem(where, f"{file} is not a complete safetensors file: {error}")]) from error
    return total or None


def context_problems(model: ModelInfo, longest: int, *, where: str) -> list[Problem]:
    """Whether a model beside the policy reads what the policy writes: `longest` tokens."""
    if model.context is None or model.context >= longest:
        return []
    message = f"its context has {model.context} tokens, but a prompt with its completion may have {longest}"
    advice = "lower data.max_prompt_tokens or sampling.max_tokens, or give another model"
    return [Problem(where, f"{message}; {advice}")]


def vocabulary_problems(policy: str, other: str, *, where: str) -> list[Problem]:
    """Whether policy and the model at `where` mean the same by a token's number; embeddings padded to other sizes are
    no problem."""
    from transformers import AutoTokenizer

    policy = tokenizer_source(policy)
    try:
        ours, theirs = (AutoTokenizer.from_pretrained(name).get_vocab() for name in (policy, other))
    except (OSError, ValueError) as error:
        return [Problem(where, f"its tokenizer cannot be compared with the policy's: {str(error).splitlines()[0]}")]
    different = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if not different:
        return []
    example = min(different)
    return [
        Problem(
            where,
            f"its vocabulary is not the policy's: {len(different)} tokens differ, such as {example!r} (the policy's "
            f"number is {ours.get(example, 'none')}, its own {theirs.get(example, 'none')}); give a model of the same "
            "family",
        )
    ]


def quantization_problems(where: str) -> list[Problem]:
    """Whether bitsandbytes can hold 4-bit weights on a machine like this one; `where` asks for them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import supported_torch_devices
    except (ImportError, OSError, RuntimeError) as error:  # it loads compiled code
        reason = str(error).partition("\n")[0]
        return [Problem(where, f"qlora needs bitsandbytes, which cannot be loaded here ({reason}); set lora")]
    if device in supported_torch_devices:
        return []
    known = ", ".join(sorted(supported_torch_devices))
    return [Problem(where, f"bitsandbytes has 4-bit weights on {known}, not on this machine's {device}; set lora")]


def critic_problems(name: str, policy: str, *, longest: int) -> list[Problem]:
    """Whether a critic of `policy` can be made of the model in a folder; a hub id is left to the run."""
    folder, where = Path(name), "algorithm.critic.model"
    if not folder.exists() and not folder.is_absolute():
        return []
    model = _read_folder(name, where)
    if not has_weights(folder):
        raise UserError([Problem(where, f"{name} has no weights (*.safetensors); give a policy or a reward model")])
    info = ModelInfo(name=name, config=model.sizes, parameters=None)
    return [*context_problems(info, longest, where=where), *vocabulary_problems(policy, name, where=where)]


def target_problems(name: str, wanted: Sequence[str], *, whose: str) -> list[Problem]:
    """Names that no linear layer of a folder's model (`whose`: what to call it) has; a hub id is left to the run."""
    from safetensors import safe_open

    layers: set[str] = set()
    for file in Path(name).glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            linear = (key for key in tensors.keys() if len(tensors.get_slice(key).get_shape()) == 2)  # noqa: SIM118
            layers |= {key.removesuffix(".weight").rpartition(".")[2] for key in linear}
    layers = {layer for layer in layers if not _EMBEDDING.search(layer)}
    missing = [target for target in wanted if target not in layers]
    if not layers or not missing:
        return []
    there = ", ".join(sorted(layers))
    message = f"no linear layer of {whose} is called {', '.join(missing)}; there are {there}"
    return [Problem("policy.lora.target_modules", message)]
