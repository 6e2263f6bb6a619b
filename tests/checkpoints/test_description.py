from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from gemma2_keras import describe_preset, list_presets
from gemma2_keras.checkpoints.description import WIDTH

pytestmark = pytest.mark.once


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", list_presets())
def test_a_page_is_plain_and_fits_80_columns(name):
    page = str(describe_preset(name))
    assert page == repr(describe_preset(name))
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= WIDTH
    assert page.startswith(name)


def test_a_page_says_what_there_is_to_know():
    page = words(str(describe_preset("gemma2_2b_en")))
    for said in (
        "licence https://ai.google.dev/gemma/terms",
        "hf://google/gemma-2-2b",
        "revision c5ebcd40d208330abc697524c919956e692655cf",
        "kaggle://keras/gemma2/keras/gemma2_2b_en/2",
        "embedding 589,824,000 22.6%",
        "total 2,614,341,888",
        "13 local 0, 2, … 24: a window of 4,096 tokens",
        "13 global 1, 3, … 25: all 8,192 tokens",
        "scale 1/16 = 256^-1/2",
        "50 on attention scores, 30 on logits",
        "8 query, 4 key-value, of 256",
        "bfloat16 5.23 GB 658 MB",
        'Gemma2CausalLM.from_preset("gemma2_2b_en")',
    ):
        assert said in page


def test_the_scale_of_the_27b_model_is_not_that_of_its_heads():
    assert "scale 1/12 = 144^-1/2" in words(str(describe_preset("gemma2_27b_en")))
    assert "scale 0.1581 = 40^-1/2" in words(str(describe_preset("gemma2_tiny_en")))


def test_of_a_model_of_images_the_tower_is_told():
    page = words(str(describe_preset("pali_gemma2_pt_3b_896")))
    for said in ("896 x 896 pixels: 4,096 tokens", "27 layers of 16 heads", "vision tower 416,866,032", "not loaded"):
        assert said in page
    assert "from_preset" not in page


def test_what_there_is_none_of_is_not_spoken_of():
    preset = describe_preset("gemma2_tiny_en")
    capless = dataclasses.replace(preset.architecture, attention_logit_soft_cap=None, final_logit_soft_cap=None)
    page = words(str(dataclasses.replace(preset, architecture=capless)))
    assert "soft caps none" in page
    assert "included in this package" in page
    assert "Kaggle" not in page
    assert "revision" not in page


def test_a_terminal_gets_colours_and_its_own_width():
    written = io.StringIO()
    Console(file=written, width=120, force_terminal=True, color_system="standard").print(
        describe_preset("gemma2_2b_en")
    )
    assert "\x1b[36m" in written.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())
    assert "total" in plain
    narrow = io.StringIO()
    Console(file=narrow, width=50).print(describe_preset("gemma2_2b_en"))
    assert max(map(len, narrow.getvalue().splitlines())) <= 50


def test_a_notebook_gets_tables_in_which_text_is_text():
    preset = dataclasses.replace(describe_preset("gemma2_2b_en"), description="<script>a & b</script>", license="<b>")
    page = preset._repr_html_()
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "<td" in page
    assert "&lt;b&gt;" in page
    for tag in ("table", "tr", "td", "th", "caption", "p"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0
    cells = re.findall(r">([^<]*)</td>", page)
    assert "2,614,341,888" in cells
