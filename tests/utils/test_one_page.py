"""A page that is one file: parts go in once, data cannot become markup, and its policy names hashes alone."""

from __future__ import annotations

import json

import pytest

from transformerlm.utils.one_page import fill, json_block, policy


def test_what_a_part_holds_is_not_looked_at_again():
    """A part that spells another part's place stays as it is; a place that is missing is an error."""
    assert fill("<{a}|{b}>", {"a": "{b}", "b": "{a}"}) == "<{b}|{a}>"
    with pytest.raises(AssertionError, match="no b where it was expected"):
        fill("{b}{a}", {"a": "", "b": ""})


def test_data_has_no_character_of_markup():
    """Ends of scripts and comments, and line separators, are spelled by their numbers, and read back."""
    data = {"</script>": "<!-- & \u2028", "n": [1.5, None]}
    block = json_block(data)
    assert block.isascii()
    assert not set("<>&") & set(block)
    assert json.loads(block) == data


def test_a_policy_allows_its_scripts_and_nothing_else():
    """The sha256 is that of the text in UTF-8; further directives come last."""
    found = policy(scripts=["a", "é"], style="", more="worker-src blob:")
    assert "script-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs=' 'sha256-" in found
    assert "style-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='" in found
    assert found.startswith("default-src 'none'; ")
    assert found.endswith("; worker-src blob:")
