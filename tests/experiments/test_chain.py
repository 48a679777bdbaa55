"""A chain of stages: where each one's model comes from, what overrides what, what is refused."""

import pytest

from antidote_fast.errors import DataError, UsageError
from antidote_fast.experiments.chain import Chain, check_own_folder

SECTIONS = {
    "align": {"dataset": "safe.jsonl", "seed": 5},
    "finetune": {"dataset": "task.jsonl", "poison_ratio": 0},
    "prune": {"dataset": "harm.jsonl", "batch_size": 2},
    "evaluate": {"harmful_dataset": "test.jsonl", "drift_dataset": "safe.jsonl"},
}


def chain(sections, clean=False, **finetune):
    sections = sections | {"finetune": sections["finetune"] | finetune}

    def folder_of(kind, stage, model):
        return f"out/{model}"

    return Chain("base", {"seed": 1}, 16, sections, folder_of, clean)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_each_stage_starts_from_the_one_before(tuning):
    made = chain(SECTIONS, tuning=tuning)
    assert [stage.output_dir for stage in made.stages.values()] == [
        *("out/aligned", "out/attacked", "out/pruned")
    ]
    sources = [stage.model_name_or_path for stage in made.stages.values()]
    if tuning == "lora":
        assert sources == ["base", "out/aligned", "out/aligned"]
        assert made.stages["prune"].adapter == "out/attacked"
        place = {"model_name_or_path": "out/aligned", "adapter": "out/pruned"}
    else:
        assert sources == ["base", "out/aligned", "out/attacked"]
        place = {"model_name_or_path": "out/pruned"}
    assert list(made.models) == ["base", "aligned", "attacked", "pruned"]
    assert made.models["pruned"] == place
    score = made.evaluation("pruned")
    assert {name: getattr(score, name) for name in place} == place
    assert score.reference_model == "out/aligned"


def test_the_model_without_poison_differs_in_nothing_else():
    poison = {"poison_ratio": 0.2, "harmful_dataset": "bad.jsonl", "learning_rate": 1e-3}
    made = chain(SECTIONS, clean=True, **poison, num_train_samples=50)
    assert list(made.stages) == ["align", "clean", "finetune", "prune"]
    assert list(made.models) == ["base", "aligned", "clean", "attacked", "pruned"]
    attack, clean = vars(made.stages["finetune"]), vars(made.stages["clean"])
    differ = {name: value for name, value in clean.items() if value != attack[name]}
    assert differ == {"poison_ratio": 0, "harmful_dataset": None, "output_dir": "out/clean"}
    assert made.models["clean"] == {"model_name_or_path": "out/aligned", "adapter": "out/clean"}
    made = chain(SECTIONS, clean=True)  # without poison it is the attack itself
    assert "clean" not in made.stages
    made = chain(SECTIONS, clean=True, tuning="full", **poison)
    assert made.models["clean"] == {"model_name_or_path": "out/clean"}


def test_sections_override_what_is_shared_and_may_be_absent():
    made = chain(SECTIONS)
    assert [stage.seed for stage in made.stages.values()] == [5, 1, 1]
    assert (made.stages["prune"].batch_size, made.evaluation("base").batch_size) == (2, 16)
    sections = {kind: SECTIONS[kind] for kind in ("finetune", "evaluate")}
    made = chain(sections)
    assert list(made.stages) == ["finetune"]
    assert list(made.models) == ["base", "attacked"]
    assert made.evaluation("base").reference_model == "base"
    with pytest.raises(UsageError, match="epochs: finetune has no such flag"):
        chain(sections, epochs=1)


def test_a_folder_of_someone_else_is_refused(tmp_path):
    folder = tmp_path / "out"
    check_own_folder(folder, (), "run")
    folder.mkdir()
    for name in ("aligned", ".aligned.partial"):
        (folder / name).touch()
    check_own_folder(folder, ("aligned",), "run")
    (folder / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds 'notes\.txt', which no run made"):
        check_own_folder(folder, ("aligned",), "run")
    with pytest.raises(DataError, match="exists and is not a folder"):
        check_own_folder(folder / "notes.txt", (), "run")
