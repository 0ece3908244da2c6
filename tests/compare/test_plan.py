"""Plans, without training."""

from copy import deepcopy

import pytest

from cola_lightning.compare.estimate import trained_tokens
from cola_lightning.compare.plan import Method, Plan
from cola_lightning.compare.plan_checks import check_results_can_be_read
from cola_lightning.compare.rates import HYBRID, Rates, flatten, set_rates, set_weight_decay
from cola_lightning.errors import InputError

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.1}}
GALORE = {
    "class_path": HYBRID,
    "init_args": {
        "matrix": {"class_path": "cola_lightning.optim.GaLore", "init_args": {"lr": 0.01, "rank": 4}},
        "other": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02, "weight_decay": 0.1}},
        "embedding": None,
    },
}
STABLE = {
    "class_path": "cola_lightning.optim.WarmupStableDecay",
    "init_args": {"warmup_steps": 10, "decay_share": 0.2, "total_steps": None},
}


def settings(optimizer=ADAMW, **changes) -> dict:
    made = {
        "trainer": {"max_steps": 100, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        "model": {"optimizer": optimizer, "schedule": STABLE},
        "data": {"init_args": {"batch_size": 4, "sequence_length": 32}},
    }
    return deepcopy(made | changes)


def make(configurations: dict | None = None, **changes) -> Plan:
    """Return a plan of the methods a and b; ``configurations`` has what their files resolve to."""

    def resolve(flags):
        named = {flag.partition("=")[2] for flag in flags if flag.startswith("--name=")}
        return deepcopy((configurations or {}).get(next(iter(named)), settings()))

    methods = {name: Method(flags={"name": name}) for name in "ab"}
    arguments = {"configs": [], "flags": {}, "methods": methods, "matrix_rates": [3, 1], "other_rates": [5, 2],
                 "seeds": [1, 2], "resolve": resolve}  # fmt: skip
    return Plan(**(arguments | changes))


def test_trials_are_numbered_grids_first_and_seeds_last():
    """After the grids, methods take turns, so that a part of the comparison has all of them."""
    trials = make(published=True, search_trials=2).trials
    search = [(t.number, t.method, t.kind, t.place, t.seed) for t in trials[8:12]]
    assert search == [(8, "a", "search", 0, 1), (9, "b", "search", 0, 1), (10, "a", "search", 1, 1),
                      (11, "b", "search", 1, 1)]  # fmt: skip
    numbered = [(t.number, t.method, t.kind, t.matrix, t.other, t.seed) for t in make(published=True).trials]
    assert numbered[:8] == [
        (0, "a", "grid", 1, 2, 1), (1, "a", "grid", 1, 5, 1), (2, "a", "grid", 3, 2, 1), (3, "a", "grid", 3, 5, 1),
        (4, "b", "grid", 1, 2, 1), (5, "b", "grid", 1, 5, 1), (6, "b", "grid", 3, 2, 1), (7, "b", "grid", 3, 5, 1),
    ]  # fmt: skip
    assert numbered[8:12] == [(8, "a", "published", 1, None, 1), (9, "a", "published", 3, None, 1),
                              (10, "b", "published", 1, None, 1), (11, "b", "published", 3, None, 1)]  # fmt: skip
    assert [each[1:] for each in numbered[12:]] == [(m, "seed", None, None, s) for s in (1, 2) for m in "ab"]


def test_finalists_come_before_the_seeds():
    numbered = [(t.number, t.method, t.kind, t.place, t.seed) for t in make(finalists=2).trials]
    assert numbered[8:13] == [(8, "a", "final", 0, 1), (9, "b", "final", 0, 1), (10, "a", "final", 1, 1),
                              (11, "b", "final", 1, 1), (12, "a", "seed", 0, 1)]  # fmt: skip
    assert make(finalists=2).trials[10].title == "a, finalist 2, seed 1"
    assert all(trial.kind != "final" for trial in make().trials)
    for number in (0, 21):
        with pytest.raises(InputError, match=f"finalists is {number}; it must be from 1 to 20"):
            make(finalists=number)


def test_a_method_may_have_rates_of_its_own_but_no_more_of_them():
    plan = make(methods={"a": Method(), "b": Method(matrix_rates=[0.1, 0.2])})
    assert {rates.matrix for rates in plan.grid("b")} == {0.1, 0.2}
    assert len(plan.grid("a")) == len(plan.grid("b")) == 4
    with pytest.raises(InputError, match="matrix_rates of b has 3 values, but the plan's has 2; every method must"):
        make(methods={"a": Method(), "b": Method(matrix_rates=[0.1, 0.2, 0.3])})


def test_a_plain_optimizer_gets_a_rate_of_its_own_for_the_other_parameters():
    made = set_rates(ADAMW, Rates(0.3, 0.7))
    assert made["class_path"] == HYBRID
    assert made["init_args"] == {
        "matrix": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3, "weight_decay": 0.1}},
        "other": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.7, "weight_decay": 0.1}},
    }
    assert ADAMW["init_args"]["lr"] == 0.001


def test_a_hybrid_optimizer_keeps_its_parts():
    head = deepcopy(GALORE)
    head["init_args"]["head"] = deepcopy(ADAMW)
    made = set_rates(head, Rates(0.3, 0.7))["init_args"]
    assert made["matrix"] == {"class_path": "cola_lightning.optim.GaLore", "init_args": {"lr": 0.3, "rank": 4}}
    assert (made["other"]["init_args"]["lr"], made["head"]["init_args"]["lr"], made["embedding"]) == (0.7, 0.7, None)


def test_an_optimizer_without_a_rate_is_refused():
    with pytest.raises(InputError, match=r"some\.Thing has no lr, so its learning rate cannot be swept"):
        set_rates({"class_path": "some.Thing", "init_args": {}}, Rates(1, 1))


def test_weight_decay_is_set_wherever_there_is_one():
    made = deepcopy(GALORE)
    set_weight_decay(made, 0.05)
    assert made["init_args"]["other"]["init_args"]["weight_decay"] == 0.05
    assert "weight_decay" not in made["init_args"]["matrix"]["init_args"]


def test_published_rates_have_the_ratio_of_the_methods_own_files():
    plan = make({"b": settings(GALORE)}, published=True)
    assert plan.published_rates("a") == [Rates(1, 1), Rates(3, 3)]
    assert plan.published_rates("b") == [Rates(1, 2), Rates(3, 6)]


def test_beta2_is_set_in_every_part_that_has_betas():
    muon = deepcopy(GALORE)
    muon["init_args"]["matrix"] = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01, "momentum": 0.95}}
    muon["init_args"]["other"]["init_args"]["betas"] = [0.8, 0.999]
    made = set_rates(muon, Rates(0.3, 0.7, 0.98))["init_args"]
    assert made["other"]["init_args"]["betas"] == [0.8, 0.98]
    assert made["matrix"]["init_args"] == {"lr": 0.3, "momentum": 0.95}
    assert set_rates(muon, Rates(0.3, 0.7))["init_args"]["other"]["init_args"]["betas"] == [0.8, 0.999]
    with pytest.raises(
        InputError, match=r"some\.Thing has no betas, so beta2 cannot be swept; remove it from the plan"
    ):
        set_rates({"class_path": "some.Thing", "init_args": {"lr": 1}}, Rates(1, 1, 0.98))


def test_the_grid_and_the_published_ratio_have_the_first_beta2():
    plan = make(beta2=[0.98, 0.9], search_trials=1, published=True)
    assert {rates.beta2 for rates in plan.grid("a") + plan.published_rates("a")} == {0.98}
    assert plan.sweep_trials == 5
    assert Rates(3, 2, 0.98).name == "m3-o2-b0.98"
    assert Rates(3, 2).name == "m3-o2"


def test_budgets_are_tokens_and_become_steps_of_the_whole_batch():
    plan = make(budgets=[51200, 25600])
    assert plan.budgets == [25600, 51200]
    assert (plan.steps("a", 25600), plan.trunk_steps("a", 25600)) == (100, 80)  # 2 x 4 x 32 tokens per step
    assert make().budgets == [100 * 256]
    stated = settings(data={"init_args": {"batch_size": 4, "sequence_length": 32, "global_batch_size": 10}})
    assert make({"a": stated}, budgets=[3200]).steps("a", 3200) == 10


def test_several_budgets_need_a_schedule_with_a_constant_part():
    cosine = settings()
    cosine["model"]["schedule"] = {"class_path": "cola_lightning.optim.WarmupCosine", "init_args": {}}
    with pytest.raises(
        InputError, match=r"a has the schedule cola_lightning\.optim\.WarmupCosine, but several budgets"
    ):
        make({"a": cosine}, budgets=[25600, 51200]).trunk_steps("a", 25600)
    with pytest.raises(InputError, match="the decay of a at 2,560 tokens begins after 8 steps, within the warmup"):
        make(budgets=[2560, 51200]).trunk_steps("a", 2560)


def test_an_estimate_counts_the_trunk_once():
    plan = make(budgets=[25600, 51200])
    # Sweep: 4 runs of 100 steps. Each of 2 seeds: a trunk of 160 steps, decays of 20 and 40; the sweep has the
    # smaller budget of the first seed, but not the trunk.
    counted = {"grid": 4 * 25600, "search": 0, "published": 0, "final": 0, "seed": (2 * 220 - 20) * 256}
    assert trained_tokens(plan, "a") == counted
    # The sweep has the smaller budget of each finalist, and the first seed is that of a finalist.
    finals = trained_tokens(make(budgets=[25600, 51200], finalists=3), "a")
    assert (finals["final"], finals["seed"]) == (3 * 200 * 256, 220 * 256)
    assert trained_tokens(make(budgets=[25600], search_trials=3), "a")["search"] == 3 * 25600
    # Of the published pairs (1, 1) and (3, 3), the grid of 1, 3 x 1, 5 has the first.
    assert trained_tokens(make(budgets=[25600], published=True, other_rates=[1, 5]), "a")["published"] == 25600


def test_a_configuration_has_the_rates_the_decay_and_the_seed():
    plan = make(weight_decay=0.0)
    made = plan.configuration("a", Rates(3, 5), 7)
    parts = made["model"]["optimizer"]["init_args"]
    assert [parts[name]["init_args"] for name in ("matrix", "other")] == [
        {"lr": 3, "weight_decay": 0.0},
        {"lr": 5, "weight_decay": 0.0},
    ]
    assert made["seed_everything"] == 7


def test_differences_from_the_baseline_are_all_but_the_rates():
    other = settings(GALORE)
    other["trainer"]["gradient_clip_val"] = None
    found = make({"b": other}).differences("b")
    assert found == {
        "trainer.gradient_clip_val": None,
        "model.optimizer.init_args.matrix.class_path": "cola_lightning.optim.GaLore",
        "model.optimizer.init_args.matrix.init_args.rank": 4,
    }
    assert make().differences("b") == {}


def test_settings_become_one_mapping():
    assert flatten({"a": {"b": 1, "c": [{"d": 2}]}, "e": {}}) == {"a.b": 1, "a.c": [{"d": 2}], "e": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, r"methods is \[\]; it must name at least one"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; it must name at least one, and none twice"),
        ({"matrix_rates": [0, 1]}, "each rate must be above 0"),
        ({"other_rates": []}, "other_rates is .*; it must name at least one"),
        ({"budgets": [0, 5]}, "each is a number of tokens above 0"),
        ({"methods": {"A b": Method(), "a-B": Method()}}, "would share a folder"),
        ({"baseline": "c"}, "baseline is 'c', which is not one of the methods"),
        ({"configs": ["gone.yaml"]}, "gone.yaml does not exist"),
        ({"search_trials": -1}, "search_trials is -1; it must be from 0 to 20"),
        ({"search_trials": 21}, "search_trials is 21; it must be from 0 to 20"),
        ({"beta2": [0.98, 1.0], "search_trials": 2}, r"beta2 is \[0.98, 1.0\]; each value must be between 0 and 1"),
        ({"beta2": [0.98, 0.98]}, "beta2 is .*; it must name at least one, and none twice"),
        (
            {"beta2": [0.98, 0.999]},
            "beta2 has 2 values, but only search_trials reach those after the first, and these ",
        ),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"limit_val_batches": 0.0},
            r"CoLA has trainer\.limit_val_batches 0\.0, with which a run validates nothing; a ",
        ),
        (
            {"logger": False},
            r"CoLA has trainer\.logger False, with which a run logs where a comparison does not read; ",
        ),
        ({"logger": [{"class_path": "CSVLogger"}]}, "logs where a comparison does not read"),
        ({"fast_dev_run": 2}, r"CoLA has trainer\.fast_dev_run 2, with which a run stores nothing"),
        ({"barebones": True}, r"trainer\.barebones True, with which a run stores nothing"),
        ({"enable_checkpointing": False}, r"stores no checkpoint; .*; leave trainer\.enable_checkpointing out"),
    ],
)
def test_settings_that_leave_no_result_are_refused(changes, message):
    usual = {"limit_val_batches": 1.0, "logger": None, "fast_dev_run": False, "barebones": False}
    check_results_can_be_read("CoLA", {"trainer": usual, "checkpoint": {"dirpath": None}})
    with pytest.raises(InputError, match=message):
        check_results_can_be_read("CoLA", {"trainer": usual | changes})
    with pytest.raises(InputError, match=r"CoLA has checkpoint\.dirpath here, which all runs would share"):
        check_results_can_be_read("CoLA", {"trainer": usual, "checkpoint": {"dirpath": "here"}})
