"""Recipes: presets, TOML both ways, overrides, and errors that a user can act on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intact.errors import RecipeError
from intact.ranges import MSE, MinMax, Percentile, Sigma, parse_range
from intact.recipe import (
    PRESETS,
    ActivationRecipe,
    InputRecipe,
    Override,
    Recipe,
    WeightRecipe,
    load_recipe,
)

BITS = st.integers(2, 8)
RANGES = st.sampled_from(["minmax", "mse", "entropy", "sigma:3", "percentile:99.9"]).map(
    parse_range
)


@st.composite
def recipes(draw):
    signed, any_scheme = (
        st.sampled_from(["symmetric", "textbook"]),
        st.sampled_from(["symmetric", "textbook", "affine"]),
    )
    activations = st.builds(ActivationRecipe, BITS, any_scheme, RANGES)
    overrides = st.builds(
        Override,
        st.sampled_from(["conv1", "layer1.*", "fc[12]", "a b.c-d"]),
        st.sampled_from(["weights", "activations"]),
        st.just("bits"),
        BITS,
    )
    unique = st.lists(overrides, max_size=3, unique_by=lambda o: (o.layers, o.section))
    return Recipe(
        name=draw(st.sampled_from(["mine", 'with "quotes"', "ünï"])),
        grid=draw(st.sampled_from(["dyadic", "power_of_two", "float"])),
        weights=draw(st.builds(WeightRecipe, BITS, signed, st.booleans(), RANGES)),
        activations=draw(activations),
        input=draw(st.builds(InputRecipe, BITS, any_scheme, RANGES, st.booleans())),
        output=draw(activations),
        overrides=tuple(sorted(draw(unique), key=lambda o: o.layers)),
    )


@given(recipes())
def test_toml_gives_back_an_equal_recipe(recipe):
    again = Recipe.from_toml(recipe.to_toml())
    same = sorted(again.overrides, key=str) == sorted(recipe.overrides, key=str)
    assert same
    assert replace(again, overrides=()) == replace(recipe, overrides=())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_toml(name):
    assert Recipe.from_toml(PRESETS[name].to_toml()) == PRESETS[name]
    assert load_recipe(name) is PRESETS[name]


def test_an_empty_file_is_the_default_recipe_but_for_its_name():
    assert replace(Recipe.from_toml(""), name="default") == PRESETS["default"]


def test_lab_is_the_textbook_scheme():
    lab = PRESETS["lab"]
    assert lab.grid == "float"
    assert not lab.weights.per_channel
    assert not lab.input.power_of_two
    for section in (lab.weights, lab.activations, lab.input, lab.output):
        assert (section.bits, section.scheme, section.range) == (8, "textbook", MinMax())


def test_overrides_apply_to_matching_layers_and_the_last_one_wins():
    recipe = Recipe.from_toml(
        """
        [layers."layer1.*".weights]
        bits = 4
        range = "sigma:2.5"
        [layers."layer1.0.conv".weights]
        bits = 6
        [layers.fc.activations]
        range = "percentile:99"
        """
    )
    assert recipe.for_weights("layer1.0.conv") == WeightRecipe(bits=6, range=Sigma(2.5))
    assert recipe.for_weights("layer1.1.conv") == WeightRecipe(bits=4, range=Sigma(2.5))
    assert recipe.for_weights("fc") == WeightRecipe()
    assert recipe.for_activations("fc").range == Percentile(99)
    assert recipe.for_activations("layer1.0.conv").range == MSE()
    assert recipe.for_activations("x", is_output=True).range == MinMax()


def test_an_override_that_matches_nothing_is_an_error_that_lists_the_layers():
    recipe = Recipe.from_toml("[layers.conv9.weights]\nbits = 4")
    with pytest.raises(RecipeError, match=r"'conv9', but no layer.*conv1, fc1"):
        recipe.check_layers(["conv1", "fc1"])


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("grid = 'cubic'", "grid is 'cubic'; choose one of float, dyadic, power_of_two"),
        ("bits = 8", "unknown key 'bits'; the keys are"),
        ("[weights]\nbits = 9", r"\[weights\]: bits is 9; choose a whole number from 2 to 8"),
        ("[weights]\nbits = 8.0", r"bits is 8.0"),
        ("[weights]\nbits = true", r"bits is True"),
        ("[weights]\nscheme = 'affine'", "a weight's zero point is 0"),
        ("[weights]\nper_channel = 1", "per_channel is 1; it is either true or false"),
        ("[input]\npower_of_two = 'yes'", "power_of_two is 'yes'"),
        ("[activations]\nrange = 'median'", r"\[activations\]: .*median"),
        ("[activations]\nrange = 3", "range is 3"),
        ("[activations]\nper_channel = true", "unknown key 'per_channel'"),
        ("[activations]\nscheme = 5", "scheme is 5"),
        ("[layers.a.biases]\nbits = 4", "has a table 'biases'"),
        ("[layers.a.weights]\nbits = 1", r"layers\.a\.weights: bits is 1"),
        ("[layers]\na = 1", "1 stands where a table belongs"),
        ("name = 3", "name is 3"),
        ("name = ", "not valid TOML"),
    ],
)
def test_mistakes_are_named(toml, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_toml(toml, "mine.toml")
    assert "mine.toml" in str(caught.value)


def test_a_recipe_that_is_neither_preset_nor_file_says_so(tmp_path):
    with pytest.raises(RecipeError, match=r"neither a preset \(default, lab\) nor a readable TOML"):
        load_recipe(str(tmp_path / "none.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="neither a preset"):
        load_recipe(binary)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[weights]\nbits = 4\n')
    assert load_recipe(path).weights.bits == 4
