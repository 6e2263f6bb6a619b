"""What `gemma2-keras finetune` is asked to do: its settings, from flags and from a YAML file, checked."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gemma2_keras.errors import InputError, nearest

# Far above any honest file of settings.
LARGEST_FILE = 64 * 2**10
# YAML 1.1 takes 1e-3, which has no point, and 1.0e3, whose exponent has no sign, for text.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,3}")
_PICTURES = (".png", ".pdf", ".svg")


class Setting(NamedTuple):
    """What may be given for one field of a `Recipe`.

    Attributes:
        section: under which heading it stands.
        kind: its type: `str`, `int`, `float`, `bool`, or `list` for a string or a list of strings.
        help: what it does, in a line.
        range: `(relation, bound)` pairs that a number must fulfil, such as `("at least", 1)`.
        choices: the strings allowed; none is any.
        optional: whether it may be `None`.
    """

    section: str
    kind: type
    help: str
    range: tuple[tuple[str, float], ...] = ()
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def allowed(self) -> str:
        """What may be given, for an error message.

        >>> Setting("", float, "", (("at least", 0), ("below", 1)), optional=True).allowed
        'a number, at least 0 and below 1, or null'
        """
        name = f"one of {', '.join(self.choices)}" if self.choices else _NAMES[self.kind]
        bounds = " and ".join(f"{relation} {bound}" for relation, bound in self.range)
        return ", ".join([name, *[bounds] * bool(bounds)]) + ", or null" * self.optional


_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a string or a list of strings",
}
_RELATIONS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt}
_COUNT, _POSITIVE, _SHARE = (("at least", 1),), (("above", 0),), (("at least", 0), ("below", 1))


def _setting(default: Any, *args: Any, **kwargs: Any) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(*args, **kwargs)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a fine-tuning is asked to do, under the names and with the defaults that Python has for it.

    Raises:
        InputError: if a value is of another type or out of its range, or two do not go together; it names them.

    Example:

    >>> Recipe(data="data.jsonl", output="adapter", learning_rate="1e-3").learning_rate
    0.001
    >>> Recipe(rank=0)
    Traceback (most recent call last):
    gemma2_keras.errors.InputError: `rank` must be a whole number, at least 1; given 0.
    """

    preset: str = _setting("gemma2_tiny_en", "Model", str, "name, hf:// handle or folder of the model to begin with")
    dtype: str | None = _setting(
        None, "Model", str, "float32, bfloat16, mixed_bfloat16 …; null is the checkpoint's", optional=True
    )

    data: str | None = _setting(
        None,
        "Data",
        str,
        'file of JSON lines: {"text": …}, {"prompt": …, "response": …} or {"messages": …}',
        optional=True,
    )
    validation: str | None = _setting(
        None, "Data", str, "another such file, to measure on before, after each epoch, and after", optional=True
    )
    validation_split: float = _setting(
        0.0, "Data", float, "share of the examples to measure on, and not to train on, instead", _SHARE
    )
    sequence_length: int | None = _setting(
        None, "Data", int, "tokens in a sequence; null is what the preset has", _COUNT, optional=True
    )
    batch_size: int = _setting(8, "Data", int, "sequences in a step", _COUNT)
    packing: bool = _setting(False, "Data", bool, "whether short examples share a sequence; they do not see each other")
    truncation: str = _setting(
        "end",
        "Data",
        str,
        "of an example that is too long: cut its end or start, drop it, or error",
        choices=("end", "start", "drop", "error"),
    )

    train: str = _setting(
        "adapter",
        "Weights",
        str,
        "adapter: LoRA beside the frozen model; all: the model itself",
        choices=("adapter", "all"),
    )
    rank: int = _setting(8, "Weights", int, "width of the adapter", _COUNT)
    targets: tuple[str, ...] | str = _setting(
        ("q_proj", "v_proj"), "Weights", list, "projections to adapt: all-linear, names, or patterns of module names"
    )
    alpha: float | None = _setting(
        None, "Weights", float, "numerator of the adapter's factor alpha / rank; null is rank", _POSITIVE, optional=True
    )
    dropout: float = _setting(0.0, "Weights", float, "rate on the adapter's inputs", _SHARE)
    use_rslora: bool = _setting(False, "Weights", bool, "rsLoRA: the factor is alpha / sqrt(rank)")
    use_dora: bool = _setting(False, "Weights", bool, "DoRA: the rows of the weights get trainable lengths")

    epochs: int = _setting(1, "Training", int, "how many times the data is gone through", _COUNT)
    learning_rate: float = _setting(
        1e-4, "Training", float, "the highest; behind the warm-up it falls along a cosine", _POSITIVE
    )
    warmup: float = _setting(0.05, "Training", float, "share of the steps in which it rises", _SHARE)
    weight_decay: float = _setting(0.004, "Training", float, "of AdamW", (("at least", 0),))
    global_clipnorm: float | None = _setting(
        None, "Training", float, "longest gradient; null does not shorten it", _POSITIVE, optional=True
    )
    gradient_accumulation_steps: int = _setting(
        1, "Training", int, "steps whose gradients are added up before the weights change", _COUNT
    )
    remat: bool = _setting(False, "Training", bool, "save memory of activations, for a quarter more work")
    seed: int = _setting(
        0, "Training", int, "of the order, the adapter's first weights and dropout", (("at least", 0), ("below", 2**32))
    )

    output: str | None = _setting(
        None, "Results", str, "folder of the adapter, or of the preset with all weights", optional=True
    )
    run_folder: str | None = _setting(
        None, "Results", str, "where checkpoints and the curve are kept; null keeps nothing", optional=True
    )
    resume: bool = _setting(False, "Results", bool, "go on with the run in run_folder; begin if there is none")
    every_minutes: float = _setting(10.0, "Results", float, "between checkpoints", _POSITIVE)
    plot: str | None = _setting(None, "Results", str, "picture of the curve to write, such as loss.png", optional=True)

    def __post_init__(self) -> None:
        for name, setting in settings().items():
            object.__setattr__(self, name, checked(name, getattr(self, name), setting))
        if self.validation is not None and self.validation_split:
            raise InputError("`validation` and `validation_split` are two ways to the same: leave one of them out.")
        if self.train == "all":
            for name in ("rank", "targets", "alpha", "dropout", "use_rslora", "use_dora"):
                if getattr(self, name) != getattr(type(self), name):
                    raise InputError(f"`{name}` is of adapters, and `train: all` has none: leave one of them out.")
        if self.remat and self.dropout:
            raise InputError("`remat` and `dropout` do not go together: leave one of them out.")
        if self.resume and self.run_folder is None:
            raise InputError("`resume` needs the `run_folder` of the run.")
        if self.plot is not None and Path(self.plot).suffix.lower() not in _PICTURES:
            raise InputError(f"`plot` must end in {', '.join(_PICTURES)}; given {self.plot!r}.")


def settings() -> dict[str, Setting]:
    """What may be given for each field of a `Recipe`, in their order."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(Recipe)}


def checked(name: str, value: Any, setting: Setting) -> Any:
    """A value as the recipe holds it.

    Raises:
        InputError: if it is of another type, or out of its range.
    """
    found = _as_kind(value, setting)
    if found is None and not (value is None and setting.optional):
        raise InputError(f"`{name}` must be {setting.allowed}; given {reprlib.repr(value)}.")
    return found


def _as_kind(value: Any, setting: Setting) -> Any:
    """A value of the setting's kind and range; `None` if it is none."""
    if setting.kind is list:
        if isinstance(value, str):
            return value or None
        several = tuple(value) if isinstance(value, list | tuple) else ()
        return several if several and all(isinstance(each, str) and each for each in several) else None
    if setting.kind is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    elif setting.kind is str:
        fits = isinstance(value, str) and value != "" and "\0" not in value
    else:
        fits = type(value) is setting.kind
    fits = fits and all(_RELATIONS[relation](value, bound) for relation, bound in setting.range)
    return value if fits and (not setting.choices or value in setting.choices) else None


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings of a YAML file, each checked by itself; those that it leaves out are missing.

    The file is one flat mapping, such as `to_yaml` writes: no anchors, nothing nested but a list of targets.

    Args:
        path: of a UTF-8 file.

    Returns:
        What `Recipe` takes.

    Raises:
        InputError: if the file is no such YAML, or a setting is unknown, stands twice, or is not what it should be; it
            names the file and the line.
        OSError: if the file cannot be read.
    """
    shown = os.fspath(path)
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise InputError(f"{shown} is longer than {LARGEST_FILE >> 10} KiB, too long for a file of settings.")
    try:
        return _parsed(shown, content.decode("utf-8-sig"))
    except InputError:
        raise
    # Numbers of thousands of digits, and dates that do not exist, are no YAMLError.
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{shown} is no YAML that can be read: {error}") from error


def _parsed(shown: str, text: str) -> dict[str, Any]:
    _require_flat(shown, text)
    # As `yaml.safe_load` does it, which forgets lines and overwrites what stands twice.
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    known = settings()
    found: dict[str, Any] = {}
    for key, value in [] if node is None else node.value:
        name, where = key.value, f"{shown}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or name not in known:
            raise InputError(f"{where}: there is no setting {reprlib.repr(name)}. {nearest(str(name), known)}")
        if name in found:
            raise InputError(f"{where}: `{name}` stands twice.")
        try:
            found[name] = checked(name, loader.construct_object(value, deep=True), known[name])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return found


def _require_flat(shown: str, text: str) -> None:
    """Refuse what settings do not need, before anything is built of it: aliases, and lists within lists."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        where = f"{shown}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise InputError(f"{where}: anchors and aliases are not taken: write the value out.")
        if depth == 0 and isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
            raise InputError(f"{where}: settings such as `rank: 8` must stand there.")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        if depth > 2 or (depth == 2 and isinstance(event, yaml.MappingStartEvent)):
            raise InputError(f"{where}: settings are not nested; write `name: value` in a line of its own.")


def to_yaml(recipe: Recipe) -> str:
    """All settings as a commented YAML file, which `read_settings` reads."""
    return "\n".join(_lines(recipe)) + "\n"


def _lines(recipe: Recipe) -> Iterator[str]:
    yield "# Settings of `gemma2-keras finetune --config FILE`; a flag such as --batch-size overrides its setting here."
    yield "# Paths are seen from where the command runs."
    section = None
    for name, setting in settings().items():
        if setting.section != section:
            section = setting.section
            yield from ("", f"## {section}", "")
        value = getattr(recipe, name)
        value = list(value) if isinstance(value, tuple) else value
        written = yaml.safe_dump(
            {name: value},
            # A list in one line, which `None` does where there is one; otherwise it would put braces around the whole.
            default_flow_style=None if isinstance(value, list) else False,
            # Rare line breaks would be read as spaces.
            allow_unicode=all(str(one).isprintable() for one in (value if isinstance(value, list) else [value])),
            width=math.inf,
        )
        yield f"# {setting.help}"
        yield written.rstrip("\n")
