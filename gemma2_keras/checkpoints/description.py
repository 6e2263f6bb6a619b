"""A page about a preset: for a terminal, for a file and for a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gemma2_keras.config import Gemma2Config
from gemma2_keras.sizes import cache_bytes, precision, readable

if TYPE_CHECKING:
    from gemma2_keras.checkpoints.catalogue import Preset

# Columns of a page that goes to no terminal.
WIDTH = 80
_DTYPES = ("float32", "bfloat16")


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        title: over it.
        rows: of as many cells each.
        header: names of the columns; empty where the first cell of each row names it.
        numbers: whether all cells but the first are numbers.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ()
    numbers: bool = False


def sections(preset: Preset) -> list[Section]:
    """What there is to say of a preset, in order."""
    parts = preset.parameter_parts
    counts = [(name, f"{count:,}", f"{count / preset.parameters:.1%}") for name, count in parts.items()]
    return [
        Section("", _origin(preset)),
        Section("Parameters", [*counts, ("total", f"{preset.parameters:,}", "")], numbers=True),
        Section("Layers", _layers(preset)),
        Section(
            "Memory", _memory(preset), ("", "weights", f"cache of {preset.architecture.context_length:,} tokens"), True
        ),
        Section("Load it", [(_loading(preset),)]),
    ]


def as_rich(preset: Preset) -> Any:
    """A page for a terminal, which `rich` fits to its width."""
    blocks: list[Any] = [Text(preset.name, style="bold"), Text(preset.description)]
    for section in sections(preset):
        blocks.append(Text(f"\n{section.title}" if section.title else "", style="bold"))
        numbers = range(1, len(section.rows[0])) if section.numbers else ()
        blocks.append(Padding(as_table(section, numbers), (0, 0, 0, 2)))
    return Group(*blocks)


def as_table(section: Section, numbers: Sequence[int]) -> Table:
    """A section's rows for `rich`; `numbers` are the columns that stand to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(section.header), header_style="dim")
    for i in range(len(section.rows[0])):
        header = section.header[i] if section.header else ""
        aligned = "right" if i in numbers else "left"
        table.add_column(header, justify=aligned, overflow="fold", no_wrap=i == 0 or i in numbers)
    for row in section.rows:
        table.add_row(*(Text(cell, style="cyan" if i == 0 and len(row) > 1 else "") for i, cell in enumerate(row)))
    return table


def as_list(presets: Sequence[Preset]) -> Any:
    """A line for each preset."""
    rows = [
        (
            preset.name,
            preset.kind,
            f"{preset.parameters:,}",
            readable(preset.parameters * precision(preset.dtype).weight),
            preset.dtype,
            "included" if preset.folder is not None else "download" if preset.is_text_model else "not yet",
        )
        for preset in presets
    ]
    return as_table(Section("", rows, ("name", "kind", "parameters", "memory", "dtype", "weights")), numbers=(2, 3))


def plain_text(page: Any) -> str:
    """What `rich` would print, without colours and at most 80 columns wide."""
    written = io.StringIO()
    # In a notebook it would show there what is printed, and write nothing.
    console = Console(
        file=written, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
    )
    console.print(page)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def as_html(preset: Preset) -> str:
    """The same page for a notebook."""
    blocks = [f"<p><b>{html.escape(preset.name)}</b><br>{html.escape(preset.description)}</p>"]
    for section in sections(preset):
        blocks.append(html_table(section))
    return "\n".join(blocks)


def html_table(section: Section) -> str:
    """A section for a notebook."""
    rows = [_html_row(section.header, "th")] if section.header else []
    rows += [_html_row(row, "td") for row in section.rows]
    title = f"<caption><b>{html.escape(section.title)}</b></caption>" if section.title else ""
    return f"<table>{title}{''.join(rows)}</table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    made = (f'<{tag} style="text-align:left">{html.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{''.join(made)}</tr>"


def _origin(preset: Preset) -> list[tuple[str, str]]:
    rows = [("kind", preset.kind), ("licence", preset.license)]
    if preset.folder is not None:
        rows.append(("weights", "included in this package"))
    if preset.hugging_face is not None:
        rows.append(("Hugging Face", f"hf://{preset.hugging_face}"))
    if preset.hugging_face_revision is not None:
        rows.append(("  revision", preset.hugging_face_revision))
    if preset.kaggle is not None:
        rows.append(("Kaggle", preset.kaggle))
    return [*rows, ("dtype", preset.dtype), ("stop tokens", ", ".join(map(str, preset.stop_token_ids)))]


def _layers(preset: Preset) -> list[tuple[str, str]]:
    config = preset.architecture
    local = [i for i in range(config.num_layers) if config.is_local(i)]
    everywhere = [i for i in range(config.num_layers) if not config.is_local(i)]
    caps = [
        f"{cap:g} on {what}"
        for cap, what in (
            (config.attention_logit_soft_cap, "attention scores"),
            (config.final_logit_soft_cap, "logits"),
        )
        if cap is not None
    ]
    rows = [
        (f"{len(local)} local", f"{_numbers(local)}: a window of {config.sliding_window_size:,} tokens"),
        (f"{len(everywhere)} global", f"{_numbers(everywhere)}: all {config.context_length:,} tokens of the context"),
        ("scale", _scale(config)),
        ("soft caps", ", ".join(caps) or "none"),
        ("heads", f"{config.num_query_heads} query, {config.num_key_value_heads} key-value, of {config.head_dim}"),
        ("widths", f"{config.hidden_dim:,}; feed-forward {config.intermediate_dim:,}"),
        ("vocabulary", f"{config.vocabulary_size:,}"),
    ]
    vision = preset.vision
    if vision is not None:
        rows += [
            ("images", f"{vision.image_size} x {vision.image_size} pixels: {vision.num_image_tokens:,} tokens"),
            ("vision tower", f"{vision.num_layers} layers of {vision.num_heads} heads; width {vision.hidden_dim:,}"),
        ]
    return rows


def _numbers(layers: list[int]) -> str:
    """Layers of an even distance, by number.

    >>> _numbers([0, 2, 4, 6])
    '0, 2, … 6'
    """
    shown = [str(i) for i in layers]
    return ", ".join(shown if len(shown) < 4 else shown[:2]) + (f", … {shown[-1]}" if len(shown) >= 4 else "")


def _scale(config: Gemma2Config) -> str:
    """The factor on the scores, as a fraction where it is one."""
    exact = Fraction(config.attention_scale).limit_denominator(1000)
    shown = str(exact) if float(exact) == config.attention_scale else f"{config.attention_scale:.4g}"
    return f"{shown} = {config.query_pre_attention_scalar:g}^-1/2"


def _memory(preset: Preset) -> list[tuple[str, ...]]:
    config = preset.architecture
    sizes = (
        (preset.parameters * precision(d).weight, cache_bytes(config, 1, config.context_length, d)) for d in _DTYPES
    )
    return [(dtype, *map(readable, row)) for dtype, row in zip(_DTYPES, sizes, strict=True)]


def _loading(preset: Preset) -> str:
    if not preset.is_text_model:
        return "Models of images and text are described here, and not loaded by this version."
    return f'model = gemma2_keras.Gemma2CausalLM.from_preset("{preset.name}")'
