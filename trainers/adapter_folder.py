"""What the folder of a PEFT adapter shows before anything is loaded: its kind, its rank and its base model.

It reads `adapter_config.json` and the header of the weights' file; it imports neither torch nor PEFT, so that the plan
and the service can use it. No code from the folder is run: weights in a pickle are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainers.errors import Problem, UserError
from trainers.model_folder import has_tokenizer, is_hub_id, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")  # what PEFT adds to the weights; prompts cannot be added
_LONGEST_CONFIG = 1 << 20
_HEAD = re.compile(r"base_model\.model\.(score|classifier)\.weight")
_PAIR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")
# Options of LoRA with which a layer computes something else than W·x + alpha / r · B·A·x.
_OTHER_SUMS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
)  # fmt: skip
_OTHER_BASES = ("corda", "loftq", "lora_ga", "olora", "pissa")  # initial values that change the base's weights too


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, by PEFT's names. A file may hold anything: what uses a value checks it."""

    peft_type: Any = None
    task_type: Any = None
    base_model_name_or_path: Any = None
    revision: Any = None
    r: Any = None
    lora_alpha: Any = None
    bias: Any = "none"
    init_lora_weights: Any = None
    other_sums: tuple[str, ...] = ()  # options that are set, of those with which a layer computes something else

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """That of the adapter in a folder. ValueError names a file that cannot be read."""
        found = read_json(folder / CONFIG, largest=_LONGEST_CONFIG)
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        return cls(**{**known, "other_sums": tuple(option for option in _OTHER_SUMS if found.get(option))})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """An adapter of a kind that can be merged into its base, with complete weights."""

    path: Path
    config: AdapterConfig
    base: str  # an absolute folder, or a hub id
    tensors: Mapping[str, Sequence[int]]  # names in the file → shapes

    @property
    def tokenizer(self) -> str:
        """Where tokenizer and chat template are: in its own folder, or the base's."""
        return str(self.path) if has_tokenizer(self.path) else self.base

    @property
    def kind(self) -> str:
        """PEFT's name for the kind of adapter."""
        return str(self.config.peft_type)

    @property
    def rank(self) -> int:
        """LoRA's r."""
        return int(self.config.r)

    @property
    def alpha(self) -> float:
        """LoRA's alpha."""
        return float(self.config.lora_alpha)

    @property
    def labels(self) -> int:
        """Outputs of the head that a classifier's adapter includes; 0 if it has none."""
        return next((int(shape[0]) for name, shape in self.tensors.items() if _HEAD.fullmatch(name)), 0)

    def rows(self, layer: str) -> int | None:
        """Rows of the layer's full matrix if the adapter includes one; None if the matrix is the base's."""
        shapes = (self.tensors.get(f"base_model.model.{layer}{end}") for end in (".weight", ".base_layer.weight"))
        return next((int(shape[0]) for shape in shapes if shape is not None), None)


def is_adapter(name: str | Path) -> bool:
    """Whether a model's name is the folder of an adapter that does not also hold a full model."""
    return os.path.isfile(Path(name) / CONFIG) and not os.path.isfile(Path(name) / "config.json")


def find_base(folder: str | Path) -> str:
    """The base model of an adapter: an absolute folder, or a hub id. Raises ValueError with what is wrong.

    A relative `base_model_name_or_path` counts from the adapter's folder, then from the working directory.
    """
    return _find_base(Path(folder), AdapterConfig.read(Path(folder)))


def tokenizer_source(name: str) -> str:
    """Where a model's tokenizer and chat template are: for an adapter its own folder, else its base's."""
    if not is_adapter(name) or has_tokenizer(Path(name)):
        return name
    try:
        return find_base(name)
    except ValueError:
        return name  # reading the model reports the error


def read_adapter(name: str | Path, *, where: str) -> AdapterFolder:
    """The adapter in a folder. Raises UserError with `where` for one that cannot be merged."""
    folder = Path(name)
    try:
        config = AdapterConfig.read(folder)
        if config.peft_type not in MERGEABLE:
            raise ValueError(f"{name} is an adapter of kind {config.peft_type}; give one of {', '.join(MERGEABLE)}")
        found = AdapterFolder(path=folder, config=config, base=_find_base(folder, config), tensors=_tensors(folder))
        _require_fit(found)
        return found
    except ValueError as error:
        raise UserError([Problem(where, str(error))]) from error


def continue_problems(adapter: AdapterFolder, *, largest_rank: int) -> list[str]:
    """Why this adapter cannot be trained on as it is: it must be plain LoRA, which the generators serve."""
    return [f"{adapter.path}: {reason}; set policy.adapter: merge" for reason in _not_plain(adapter, largest_rank)][:1]


def _not_plain(adapter: AdapterFolder, largest_rank: int) -> Iterator[str]:
    config = adapter.config
    if adapter.kind != "LORA":
        yield f"only LoRA can be continued, and this is {adapter.kind}"
        return
    yield from (f"{option} cannot be continued" for option in config.other_sums)
    if config.bias != "none":
        yield f"its biases are trained too (bias: {config.bias}), which cannot be continued"
    if str(config.init_lora_weights).startswith(_OTHER_BASES):
        yield f"init_lora_weights: {config.init_lora_weights} changes the base too, which cannot be continued"
    rank, alpha = config.r, config.lora_alpha
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        yield f"{CONFIG} has no rank (r: {rank}) and scale (lora_alpha: {alpha})"
        return
    if rank > largest_rank:
        yield f"its rank {rank} is more than the {largest_rank} that the generators serve"
    for tensor, shape in adapter.tensors.items():
        layer, _ = _layer_and_side(tensor)
        if layer is None or layer.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            yield f"it holds {tensor}, and only adapters of linear layers can be continued"
        elif rank not in shape:
            yield f"{tensor} has shape {list(shape)}, and {CONFIG} has rank {rank}"


def _layer_and_side(tensor: str) -> tuple[str | None, str]:
    """Of `….lora_A.weight` or `….lora_B.weight`, the layer and A or B; a layer of None for any other tensor."""
    found = _PAIR.fullmatch(tensor)
    return (found.group("layer"), found.group("side")) if found is not None else (None, "")


def _find_base(folder: Path, config: AdapterConfig) -> str:
    file, named = folder / CONFIG, config.base_model_name_or_path
    if not isinstance(named, str) or not named:
        raise ValueError(f"{file} names no base model; set base_model_name_or_path to its path")
    if "://" in named:
        raise ValueError(f"the base of {folder} is the address {named}; only a folder or a hub id can be a base")
    for start in (folder, Path.cwd()):
        if os.path.isdir(start / named):
            base = os.path.abspath(start / named)
            if is_adapter(base):
                raise ValueError(f"the base of {folder} is an adapter itself: {base}; merge it first")
            return base
    if not is_hub_id(named):
        raise ValueError(
            f"the base of {folder} is not here: {named} (base_model_name_or_path in {CONFIG}); set it "
            "to the present path"
        )
    if config.revision:
        raise ValueError(f"the base of {folder} is revision {config.revision} of {named}; name a folder with it")
    return named


def _require_fit(adapter: AdapterFolder) -> None:
    """Raises ValueError if the base is a folder and lacks one of these layers or has it in another size.

    Layers whose names do not occur in the base's files are checked at loading: files may use other names.
    """
    base = _matrices(Path(adapter.base))
    families = {_DIGITS.sub("#", layer) for layer in base}
    for tensor, shape in adapter.tensors.items():
        layer, side = _layer_and_side(tensor)
        if layer is None or _DIGITS.sub("#", layer) not in families:
            continue
        if layer not in base:
            raise ValueError(f"{adapter.path} is not an adapter of {adapter.base}, which has no {layer}")
        if shape[1 if side == "A" else 0] not in base[layer]:
            sizes = " × ".join(map(str, base[layer])), " × ".join(map(str, shape))
            raise ValueError(
                f"{adapter.path} is not an adapter of {adapter.base}, whose {layer} is {sizes[0]}, while its own "
                f"lora_{side} is {sizes[1]}"
            )


def _matrices(folder: Path) -> dict[str, Sequence[int]]:
    """Names without `.weight` → shapes; what is packed (4-bit weights) and what cannot be read is left out."""
    found: dict[str, Sequence[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            for key, (shape, dtype) in _header(file).items():
                if key.endswith(".weight") and len(shape) == 2 and dtype != "U8":
                    found[key.removesuffix(".weight")] = shape
        except ValueError:
            continue
    return found


def _tensors(folder: Path) -> dict[str, Sequence[int]]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickle = f"{PICKLE} is a pickle, which can run code; save it again with save_pretrained of a current PEFT"
        raise ValueError(f"{folder} holds no {WEIGHTS}" + (f" ({pickle})" if (folder / PICKLE).is_file() else ""))
    found = {key: shape for key, (shape, _) in _header(file).items()}
    if not found:
        raise ValueError(f"{file} holds no tensors")
    return found


def _header(file: Path) -> dict[str, tuple[Sequence[int], str]]:
    """Shape and type of every tensor. ValueError for a file that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
