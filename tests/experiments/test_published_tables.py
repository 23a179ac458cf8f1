"""Tables under `results/` are those drawn from the records there, and the documentation shows them."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from netfission.experiments.compare import summarise
from netfission.experiments.costs import Costs
from netfission.experiments.grid_files import find_grid
from netfission.experiments.grids import named_grids
from netfission.experiments.records import Record, Records
from netfission.experiments.results import Comparison
from netfission.experiments.statistics import SeedValues
from netfission.utils.json_files import read_json
from netfission.utils.typed import typed

ROOT = Path(__file__).parents[2]
LONG = "as long as the deep ensemble"  # in the names of contenders
FOLDERS = [
    folder
    for name in named_grids()
    for scale in ("laptop", "paper")
    if (folder := ROOT / "results" / f"{name}-{scale}").is_dir()
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_records(folder):
    name, _, scale = folder.name.rpartition("-")
    grid = find_grid(name).at(scale)
    cells, records = grid.cells(), Records(folder / "records")
    found = [records.find(cell) for cell in cells]
    assert len(list(records.path.iterdir())) == len(cells)
    costs = typed(Costs, json.loads((folder / "costs.json").read_text("utf-8"))["costs"])
    comparison = summarise(grid, cells, found, costs)
    assert comparison.table() + "\n" == (folder / "comparison.txt").read_text("utf-8")
    assert comparison.markdown() + "\n" == (folder / "comparison.md").read_text("utf-8")


def test_the_table_of_variants_that_are_no_longer_in_the_code_is_that_of_its_record():
    folder = ROOT / "results" / "variants-laptop"
    comparison = typed(Comparison, json.loads((folder / "comparison.json").read_text("utf-8")))
    assert comparison.table() + "\n" == (folder / "comparison.txt").read_text("utf-8")
    assert comparison.markdown() + "\n" == (folder / "comparison.md").read_text("utf-8")
    (note,) = comparison.notes
    assert note in comparison.table()
    records = [typed(Record, json.loads(file.read_text("utf-8"))) for file in (folder / "records").iterdir()]
    for record in records:
        name = "as it is" if record.contender == "fission-channels" else record.contender
        for key in ("top1", "nll", "ece", "brier"):
            assert comparison.metrics[name][key].values[record.seed] == record.evaluation["ensemble"][key]
    assert f"{sum(record.data is None for record in records)} of the {len(records)} records" in note


def test_the_documentation_shows_the_simulation_of_guarantees_and_every_bound_holds():
    record = json.loads((ROOT / "results" / "benchmark_guarantees.json").read_text("utf-8"))
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    for data in record["data"]:
        name = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[data["data"]]
        sets = [row for row in data["rows"] if "sets" in row]
        for row in sets:
            bounded = row["sets"]["delta"] is not None
            assert not bounded or row["sets"]["below"]["interval"][0] <= row["sets"]["delta"]
            mean, error = row["sets"]["coverage_mean"], row["sets"]["coverage_standard_error"]
            assert mean + 2 * error > row["sets"]["coverage"]
        lac = [row for row in sets if row["sets"]["score"] == "lac" and "class_wise" not in row["sets"]]
        for plain, bound in zip(lac[::2], lac[1::2], strict=True):
            cells = [name, f"{plain['n']:,}", f"{100 * plain['sets']['coverage_mean']:.1f}"]
            cells += [f"{plain['sets']['set_size_mean']:.2f}", shown(bound["sets"]["below"])]
            cells += [f"{bound['sets']['set_size_mean']:.2f}"]
            assert f"| {' | '.join(cells)} |" in page
        for row in (row for row in data["rows"] if "abstention" in row):
            abstention = row["abstention"]
            assert abstention["bound"]["broken"]["interval"][0] <= abstention["delta"]
            cells = [name, f"{100 * abstention['risk']:g} %", f"{row['n']:,}"]
            for rule in ("bound", "no_bound"):
                answered = f"{100 * abstention[rule]['answered_mean']:.1f}"
                cells += [shown(abstention[rule]["broken"]), answered]
            assert f"| {' | '.join(cells)} |" in page


def shown(broken):
    low, high = broken["interval"]
    return f"{100 * broken['share']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_the_documentation_shows_the_table_of_methods_as_it_was_drawn():
    _, table, *_ = (ROOT / "results" / "figure3-laptop" / "comparison.md").read_text("utf-8").split("\n\n")
    assert table in (ROOT / "docs" / "results.md").read_text("utf-8")


def test_the_documentation_shows_what_was_made_of_a_fine_tuned_network():
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    for scale in ("cifar100", "third", "flowers-40", "flowers-200", "resnet", "vit", "recipe"):
        folder = ROOT / "results" / f"finetune-{scale}"
        _, table, *_ = (folder / "comparison.md").read_text("utf-8").split("\n\n")
        assert table.strip() in page
        blocks = (folder / "comparison.txt").read_text("utf-8").split("\n\n")
        (differences,) = [block for block in blocks if block.startswith("minus ")]
        for line in differences.splitlines()[1:]:
            cells = re.split(r"\s{2,}", re.sub(r"(?<![a-z])-(?=\d)", "−", line.strip()))
            assert f"| {' | '.join(cells)} |" in page


def test_the_documentation_shows_what_killed_and_damaged_runs_became():
    page = " ".join((ROOT / "docs" / "promises.md").read_text("utf-8").split())
    trials = json.loads((ROOT / "results" / "benchmark_torture.json").read_text("utf-8"))
    kills, outcomes = trials["kills"], [trial["outcome"] for trial in trials["damage"]]
    good, signals = sum(trial["identical"] for trial in kills), sum(len(trial["kills"]) for trial in kills)
    assert f"{good} of {len(kills)} killed commands ended in the same bits, after {signals} signals." in page
    refused, before, harmless = map(outcomes.count, ("refused", "fell back", "without effect"))
    assert refused + before + harmless == len(outcomes)  # none was taken silently
    assert f"Of {len(outcomes)} damaged files, {refused} were refused, {before} gave way to" in page
    assert f"{harmless} had no effect on any bit" in page


def test_the_documentation_shows_how_the_recipe_was_chosen():
    page = " ".join((ROOT / "docs" / "results.md").read_text("utf-8").split())
    files = (ROOT / "results" / "finetune-recipe" / "records").iterdir()
    runs: dict[object, dict[int, dict[str, float]]] = {}
    for record in (read_json(file, Record) for file in files):
        config = record.settings
        if (
            config.get("schedule") == "cosine"
            and config.get("rand_augment")
            and config.get("label_smoothing")
        ):
            form = config.get("layer_decay"), config.get("patience"), config["learning_rate"]
            runs.setdefault(form, {})[record.seed] = record.read_evaluation().ensemble

    def values(form: tuple[float | None, int | None, float], metric: str) -> SeedValues:
        return SeedValues({seed: measured[metric] for seed, measured in runs[form].items()})

    before, now, quick = (0.85, 5, 5e-4), (None, None, 5e-4), (None, None, 1e-3)
    for metric, factor, digits in (("top1", 100, 2), ("nll", 1, 3)):
        assert _difference(values(now, metric), values(before, metric), factor, digits) in page
        found = values(quick, metric)
        assert found.n == 3
        assert f"{factor * found.mean:.{digits}f} ± {factor * found.deviation:.{digits}f}" in page
    without = values((None, 5, 5e-4), "top1").minus(values(before, "top1"))
    assert all(0.0135 < gain < 0.0205 for gain in without.values.values()) and without.n == 2
    unstopped = values((0.85, None, 5e-4), "top1")
    stopped = values(before, "top1").values
    gains = {seed: 100 * (stopped[seed] - value) for seed, value in unstopped.values.items()}
    assert sorted(round(gain, 1) for gain in gains.values()) == [-1.2, 0.5]
    assert "Early stopping lost 1.2 points on one and gained 0.5 on the other" in page


def test_the_documentation_shows_what_one_command_gave():
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    runs = json.loads((ROOT / "results" / "finetune_command.json").read_text("utf-8"))["runs"]
    cases = {(run["data"], run["case"]) for run in runs}
    assert len(cases) == 4
    for case in cases:
        chosen = [run for run in runs if (run["data"], run["case"]) == case]
        assert {run["seed"] for run in chosen} == {0, 1, 2}
        cells = []
        for metric, factor, digits in (("top1", 100, 2), ("nll", 1, 3), ("ece", 100, 1)):
            single, ensemble = (
                SeedValues({run["seed"]: run[network][metric] for run in chosen})
                for network in ("single", "ensemble")
            )
            cells.append(" → ".join(f"{factor * values.mean:.{digits}f}" for values in (single, ensemble)))
            cells.append(_difference(ensemble, single, factor, digits))
        assert f"| {' | '.join(cells)} |" in page


def _forms(scale: str) -> dict[str, dict[str, SeedValues]]:
    """Return the figures of each form of a fine-tuned network that was made with three seeds."""
    metrics: dict[tuple[str, object], dict[int, dict[str, float]]] = {}
    for file in (ROOT / "results" / f"finetune-{scale}" / "records").iterdir():
        record = read_json(file, Record)
        form = record.contender, record.settings.get("linear_weight")
        metrics.setdefault(form, {})[record.seed] = record.read_evaluation().ensemble
    return {
        contender: {
            name: SeedValues({seed: measured[name] for seed, measured in seeds.items()})
            for name in ("top1", "nll", "ece", "brier")
        }
        for (contender, _), seeds in metrics.items()
        if len(seeds) == 3
    }


def _cells(values: dict[str, SeedValues]) -> list[str]:
    return [
        f"{factor * values[name].mean:.{digits}f} ± {factor * values[name].deviation:.{digits}f}"
        for name, factor, digits in (("top1", 100, 2), ("nll", 1, 3), ("ece", 100, 1))
    ]


def _difference(values: SeedValues, others: SeedValues, factor: int, digits: int) -> str:
    """Return the cell of a difference, with its interval."""
    difference = values.minus(others)
    ends = (f"{factor * (difference.mean + sign * difference.margin):+.{digits}f}" for sign in (-1, 1))
    return f"{factor * difference.mean:+.{digits}f} [{', '.join(ends)}]".replace("-", "−")


def _differences(values: dict[str, SeedValues], others: dict[str, SeedValues]) -> list[str]:
    figures = (("top1", 100, 2), ("nll", 1, 3))
    return [_difference(values[name], others[name], factor, digits) for name, factor, digits in figures]


def test_the_documentation_shows_all_forms_of_a_fine_tuned_network():
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    forms = {name: values for name, values in _forms("cifar100").items() if LONG not in name}
    reference = forms["fine-tuned network, itself as teacher"]
    assert len(forms) == 12
    for values in forms.values():
        differences = ["–", "–"] if values is reference else _differences(values, reference)
        cells = [*_cells(values), f"{values['brier'].mean:.3f}", *differences]
        assert f"| {' | '.join(cells)} |" in page


def test_the_documentation_shows_what_a_single_network_has_that_is_trained_at_once():
    results, readme = (
        " ".join((ROOT / page).read_text("utf-8").split()) for page in ("docs/results.md", "README.md")
    )
    files = (ROOT / "results" / "finetune-cifar100" / "records").iterdir()
    ensembles = [record for file in files if (record := read_json(file, Record)).contender == "deep-ensemble"]
    members = {record.seed: record.read_evaluation().exits for record in ensembles}
    forms = _forms("cifar100")
    shown = []
    for metric, factor, digits in (("top1", 100, 2), ("nll", 1, 3)):
        values = [factor * exit_[metric] for exits in members.values() for exit_ in exits]
        assert len(values) == 9
        shown.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}")
        means = SeedValues({seed: mean(exit_[metric] for exit_ in exits) for seed, exits in members.items()})
        gain = forms["two linear exits after stage 4"][metric]
        assert _difference(gain, means, factor, digits) in results
        difference = gain.minus(means)
        assert f"{abs(factor * difference.mean):.{digits}f}" in readme
    for page in (results, readme):
        assert all(value in page for value in shown)


@pytest.mark.parametrize("scale", ["cifar100", "flowers-40"])
def test_the_documentation_shows_as_much_training_as_a_deep_ensemble(scale):
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    forms = _forms(scale)
    reference = forms["deep-ensemble"]
    shown = [values for name, values in forms.items() if LONG in name]
    assert len(shown) == 2
    for values in (reference, *shown):
        differences = ["–", "–"] if values is reference else _differences(values, reference)
        assert f"| {' | '.join([*_cells(values), *differences])} |" in page


def test_the_documentation_shows_what_a_third_of_the_training_gave():
    page = " ".join((ROOT / "docs" / "results.md").read_text("utf-8").split())
    files = (ROOT / "results" / "finetune-third" / "records").iterdir()
    records = [read_json(file, Record) for file in files]

    def gain(metric: str) -> SeedValues:
        after, before = (
            SeedValues(
                {
                    record.seed: record.read_evaluation().ensemble[metric]
                    for record in records
                    if record.contender == name
                }
            )
            for name in ("two linear exits after stage 4, 2 epochs", "fine-tuned network")
        )
        return after.minus(before)

    accuracy, nll = gain("top1"), gain("nll")
    low, high = (100 * (accuracy.mean + sign * accuracy.margin) for sign in (-1, 1))
    assert f"the accuracy rises by {100 * accuracy.mean:.2f} points [{low:.2f}, {high:.2f}]" in page
    low, high = (-nll.mean + sign * nll.margin for sign in (-1, 1))
    assert f"the NLL falls by {-nll.mean:.3f} [{low:.3f}, {high:.3f}]" in page


@pytest.mark.parametrize("data", ["cifar100", "flowers-40"])
def test_the_documentation_shows_how_other_images_are_told(data):
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    networks = json.loads((ROOT / "results" / "finetune_ood.json").read_text("utf-8"))["networks"]
    shown = [network for network in networks if network["data"] == data]
    contenders = (
        "fine-tuned network",
        "fine-tuned network, itself as teacher",
        "two linear exits after stage 4",
    )

    def values(contender: str, score: str, metric: str) -> SeedValues:
        chosen = [one for one in shown if one["contender"] == contender and score in one["scores"]]
        return SeedValues({one["seed"]: one["scores"][score][metric] for one in chosen})

    for score in shown[-1]["scores"]:
        cells = []
        for contender in contenders:
            for metric in ("auroc", "fpr95"):
                found = values(contender, score, metric)
                assert found.n in (0, 3)
                cells.append(f"{100 * found.mean:.1f} ± {100 * found.deviation:.1f}" if found.n else "–")
        assert f"| {score} | {' | '.join(cells)} |" in page
    gain = values(contenders[2], "entropy", "auroc").minus(values(contenders[1], "entropy", "auroc"))
    low, high = (100 * (gain.mean + sign * gain.margin) for sign in (-1, 1))
    assert f"{100 * gain.mean:+.1f} [{low:+.1f}, {high:+.1f}] points".replace("-", "−") in page or (
        f"{100 * gain.mean:+.1f} [{low:+.1f}, {high:+.1f}] here".replace("-", "−") in page
    )


def test_the_documentation_shows_what_batches_of_few_images_gave():
    runs = json.loads((ROOT / "results" / "finetune_batches.json").read_text("utf-8"))["runs"]

    def accuracy(images: int, batch: int) -> str:
        values = [
            run["validation_accuracy"]
            for run in runs
            if (run["training_images"], run["batch_size"], run["learning_rate"]) == (images, batch, 5e-4)
        ]
        assert len(values) == 3
        return f"{100 * sum(values) / 3:.0f} %"

    page = " ".join((ROOT / "docs" / "how-to" / "image-folder.md").read_text("utf-8").split())
    few, small, large = 60, accuracy(60, 8), accuracy(60, 64)
    assert f"fine-tuned on {few} images have an accuracy of {small} with batches of 8 and {large}" in page
    assert f"on 200 images {accuracy(200, 16)} with batches of 16 and {accuracy(200, 64)} with" in page


class _Temperatures:
    """What temperature scaling gave the networks of a grid."""

    def __init__(self, scale: str) -> None:
        file = ROOT / "results" / f"finetune-{scale}" / "temperature.json"
        self.networks = json.loads(file.read_text("utf-8"))["networks"]
        self.contenders = {network["contender"] for network in self.networks if network["seed"] == 2}

    def values(self, contender: str, kind: str, metric: str) -> SeedValues:
        shown = [network for network in self.networks if network["contender"] == contender]
        return SeedValues({network["seed"]: network[kind][metric] for network in shown})

    def cells(self, contender: str) -> tuple[str, str, str]:
        """Return NLL, ECE, and the NLL minus that of the network with itself as teacher, all scaled."""
        nll, ece = (self.values(contender, "scaled", metric) for metric in ("nll", "ece"))
        assert nll.n == 3
        reference = "fine-tuned network, itself as teacher"
        others = self.values(reference, "scaled", "nll")
        return (
            f"{nll.mean:.3f} ± {nll.deviation:.3f}",
            f"{100 * ece.mean:.2f} ± {100 * ece.deviation:.2f}",
            "–" if contender == reference else _difference(nll, others, 1, 3),
        )


@pytest.mark.parametrize("scale", ["flowers-40"])
def test_the_documentation_shows_what_temperature_scaling_gave(scale):
    found, page = _Temperatures(scale), (ROOT / "docs" / "results.md").read_text("utf-8")
    assert len(found.contenders) == 4
    for seed in range(3):
        nll = {name: found.values(name, "scaled", "nll").values[seed] for name in found.contenders}
        assert min(nll, key=nll.__getitem__) == "two linear exits after stage 4"
    for name in found.contenders:
        nll, ece, difference = found.cells(name)
        cells = [
            name,
            f"{100 * found.values(name, 'scaled', 'top1').mean:.2f}",
            f"{found.values(name, 'plain', 'nll').mean:.3f}",
            nll,
            f"{100 * found.values(name, 'plain', 'ece').mean:.2f}",
            ece,
            difference,
        ]
        assert f"| {' | '.join(cells)} |" in page


def test_the_documentation_shows_other_images_and_temperatures_of_all_forms():
    found, page = _Temperatures("flowers-200"), (ROOT / "docs" / "results.md").read_text("utf-8")
    file = ROOT / "results" / "finetune-flowers-200" / "other_images.json"
    others = json.loads(file.read_text("utf-8"))["networks"]
    assert len(found.contenders) == 12
    for name in found.contenders:
        shown = [network for network in others if network["contender"] == name]
        auroc = SeedValues({network["seed"]: network["scores"]["entropy"]["auroc"] for network in shown})
        assert auroc.n == 3
        cells = [name, f"{100 * auroc.mean:.1f} ± {100 * auroc.deviation:.1f}", *found.cells(name)]
        assert f"| {' | '.join(cells)} |" in page
