"""Recipes: strict, readable back to the same recipe, settled by their backbone."""

from pathlib import Path

import pytest

from fastidmm.errors import UsageError
from fastidmm.options import recipe_of
from fastidmm.recipe import Recipe, read_tables, with_settings

SHIPPED = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_whole_and_read_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = Recipe.of(with_settings(read_tables(name), {"run.dataset": "demo"}, []))
    path = tmp_path / "again.toml"
    path.write_text(recipe.toml())
    assert Recipe.of(read_tables(str(path))) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_begin_with_their_claim(name: str) -> None:
    text = (Path(__file__).parents[1] / "configs" / f"{name}.toml").read_text()
    header = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert any(line.startswith(("#   fastidmm ", "#   make demo")) for line in header)


def test_paper_and_official_differ_where_the_published_code_differs() -> None:
    paper, official = (
        Recipe.of(with_settings(read_tables(n), {"run.dataset": "demo"}, []))
        for n in ("paper", "official")
    )
    assert paper.method.model_dump()["smoothing"] == 0.1
    assert official.method.model_dump()["smoothing"] == 0.0
    assert official.method.model_dump()["std"] == (0.228, 0.224, 0.225)
    assert paper.method.model_dump()["std"] == (0.229, 0.224, 0.225)
    assert (paper.optim.schedule, official.optim.schedule) == ("cosine", "idmm_legacy")
    assert (paper.run.precision, official.run.precision) == ("auto", "fp32")
    assert (paper.optim.lr, paper.optim.warmup_epochs) == (5e-4, 2)
    assert (official.optim.lr, official.optim.warmup_epochs) == (5e-4, 2)


@pytest.mark.parametrize("backbone", ["pvtv2_b0", "t2t_vit_7"])
@pytest.mark.parametrize("name", ["paper", "official"])
def test_rate_and_warm_up_are_the_backbones(name: str, backbone: str) -> None:
    asked = {"run.dataset": "demo", "run.backbone": backbone}
    optim = Recipe.of(with_settings(read_tables(name), asked, [])).optim
    assert (optim.lr, optim.warmup_epochs) == (1e-3, 10)


def test_defaults_are_the_papers() -> None:
    """Without a recipe, the classes' own defaults say the same as configs/paper.toml."""
    named = Recipe.of(with_settings(read_tables("paper"), {"run.dataset": "demo"}, []))
    assert Recipe.of({"run": {"dataset": "demo"}}) == named


def test_the_backbone_settles_what_is_unset() -> None:
    recipe = Recipe.of({"run": {"dataset": "demo", "backbone": "pvtv2_b3"}})
    assert (recipe.optim.lr, recipe.optim.warmup_epochs) == (1e-3, 10)
    short = Recipe.of({"run": {"dataset": "demo", "backbone": "pvtv2_b3", "epochs": 8}})
    assert short.optim.warmup_epochs == 2
    assert (short.run.knn_every, short.run.checkpoint_every) == (2, 1)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"run": {"dataset": "d", "epoch": 3}}, r"unknown key run\.epoch: did you mean 'epochs'"),
        ({"optim": {"lrr": 1}, "run": {"dataset": "d"}}, r"unknown key optim\.lrr: did you mean"),
        ({"metod": {}, "run": {"dataset": "d"}}, r"unknown table \[metod\].*did you mean 'method'"),
        ({"run": {}}, r"lacks run\.dataset"),
        ({"run": {"dataset": "d", "epochs": 0}}, r"run\.epochs = 0: input should be greater"),
        ({"run": {"dataset": "d", "seed": 2**32}}, r"run\.seed"),
        ({"run": {"dataset": "d", "method": "idm"}}, r"unknown method 'idm': did you mean 'idmm'"),
        ({"run": {"dataset": "d"}, "optim": {"warmup_epochs": 900}}, r"more than the 800 epochs"),
        (
            {"run": {"dataset": "d"}, "method": {"large_scale": [1, 0.5]}},
            r"^method\.large_scale = \[1, 0\.5\]: a share of the area needs 0 < low",
        ),
        *(
            (
                {"run": {"dataset": "d"}, "optim": {"betas": wrong}},
                r"^optim\.betas = .*: it takes 2 values in brackets, such as "
                r"optim\.betas=\[0\.9, 0\.999\]\.$",
            )
            for wrong in (0.9, "a", [0.9], [0.9, 0.99, 0.999], [])
        ),
        (
            {"run": {"dataset": "d"}, "optim": {"betas": [0.9, 7]}},
            r"^optim\.betas = 7: input should",
        ),
        ({"run": 3}, r"\[run\] in the recipe must be a table"),
        (
            {"run": {"dataset": "d", "method": "simclr"}, "optim": [3]},
            r"\[optim\] in the recipe must be a table, not \[3\]",
        ),
    ],
)
def test_wrong_tables_are_answered_in_a_sentence(tables: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.of(tables)  # type: ignore[arg-type]


def test_set_takes_toml_values_and_plain_words() -> None:
    tables = with_settings(
        {}, {"run.epochs": 5, "run.seed": None}, ["optim.lr=1e-3", "run.dataset=mine"]
    )
    assert tables == {"run": {"epochs": 5, "dataset": "mine"}, "optim": {"lr": 1e-3}}
    with pytest.raises(UsageError, match=r"TABLE\.KEY=VALUE"):
        with_settings({}, {}, ["lr=1"])


def test_a_missing_recipe_and_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        read_tables("demoo")
    (tmp_path / "paper.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("./paper", str(tmp_path / "paper"), "mine"):
        Path(f"{name}.toml").touch()
        with pytest.raises(UsageError, match=rf"^no recipe '{name}': did you mean {name}\.toml\?$"):
            read_tables(name)
    assert read_tables("paper")["run"]  # the one that comes with fastidmm
    path = tmp_path / "broken.toml"
    path.write_text("[run\n")
    with pytest.raises(UsageError, match="is not TOML"):
        read_tables(str(path))
    path.write_text("[[run]]\n")
    with pytest.raises(UsageError, match=r"\[run\] in the recipe must be a table"):
        recipe_of(str(path), {}, None)


def test_text_survives_toml(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    odd = 'a "quoted" \\ name\n\x7f with é and 🌻'
    path.write_text(Recipe.of({"run": {"dataset": odd}}).toml())
    assert Recipe.of(read_tables(str(path))).run.dataset == odd
