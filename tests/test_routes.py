import pytest

from routed_peft import presets
from routed_peft.routes import Route, check_region_name, routes_from_dict, routes_to_dict, validate_routes


@pytest.mark.parametrize(
    "routes",
    [presets.sgtm("bio"), presets.era(), presets.gram(["bio", "cyber"]), presets.classic(), presets.exclusive("hack")],
)
def test_routes_survive_json(routes):
    assert routes_from_dict(routes_to_dict(routes)) == routes and list(routes_to_dict(routes)) == list(routes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ablated": "forget"}, r'got the string \'forget\': write \("forget",\)'),
        ({"weights": {"base": float("nan")}}, "must be finite numbers, got {'base': nan}"),
        ({"weights": {"base": float("inf")}}, "must be finite numbers"),
        ({"ablated": ("base",)}, "`ablated` names regions, got 'base'"),
    ],
)
def test_bad_routes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Route(**fields)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"the keys `weights` and `ablated`, got \['ablate'\], too"):
        Route.from_dict({"ablate": ["forget"]})


@pytest.mark.parametrize(
    ("routes", "base", "message"),
    [
        ({}, True, "`routes` is empty"),
        ({1: Route()}, True, "maps a label .* to a Route, got 1"),
        ({"a": Route(weights={"bio": 0.0})}, True, "names 'bio'; this model has 'base' and the regions"),
        ({"a": Route(), "b": Route(ablated=("forget",))}, False, "'b' blocks everything"),
        ({"a": Route(ablated=("forget",))}, True, "no route trains the region 'forget'"),
    ],
)
def test_bad_tables_are_refused(routes, base, message):
    with pytest.raises(ValueError, match=message):
        validate_routes(routes, ["forget"], base=base)


BAD_NAMES = ["default", "Base", "ref", "joint", "all", "none", "ablated", "checkpoint-3", "a.b", "", "bio+cyber", "a/b"]
BAD_NAMES += ["/tmp/region", "..", "a\\b", "a b", "-x", "a\n", "é" * 33, "x" * 65, "x" * 242, 3, None]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_with_another_meaning_are_refused(name):
    with pytest.raises(ValueError, match="a region cannot be called"):
        check_region_name(name)
