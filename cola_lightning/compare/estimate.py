"""Estimate how long a comparison takes, before it begins."""

from cola_lightning.compare.plan import KINDS, Plan


def trained_tokens(plan: Plan, method: str) -> dict[str, int]:
    """Count the tokens that all trials of a method train on, by the kind of trial. A shared trunk counts once."""
    counts = {kind: sum(trial.kind == kind and trial.method == method for trial in plan.trials) for kind in KINDS}
    smallest = plan.budgets[0]
    tokens = {kind: counts[kind] * smallest for kind in ("grid", "search", "published")}
    if plan.published:  # pairs that the grid has already are not trained again
        tokens["published"] = len({*plan.published_rates(method)} - {*plan.grid(method)}) * smallest
    per_seed: float = plan.budgets[-1]
    known: float = smallest  # the sweep has the first seed's smallest budget, with several budgets without its trunk
    if len(plan.budgets) > 1:
        per_step = plan.budgets[-1] / plan.steps(method, plan.budgets[-1])
        # The trunk once, up to where the last decay begins, and each decay.
        per_seed = plan.trunk_steps(method, plan.budgets[-1]) * per_step
        for budget in plan.budgets:
            per_seed += (plan.steps(method, budget) - plan.trunk_steps(method, budget)) * per_step
        known = (plan.steps(method, smallest) - plan.trunk_steps(method, smallest)) * per_step
    tokens["final"] = round(counts["final"] * (per_seed - known))
    # The first seed of the best is one of the finalists, if there are several.
    tokens["seed"] = round(counts["seed"] * per_seed - (per_seed if counts["final"] else known))
    return tokens


def print_estimate(plan: Plan, tokens_per_second: float, jobs: int) -> None:
    """Print tokens and hours of a plan.

    Args:
        plan: The plan.
        tokens_per_second: Speed of one run, as a mean over the methods.
        jobs: Number of runs at a time, each at that speed.
    """
    totals: dict[str, int] = {kind: 0 for kind in KINDS}
    for method in plan.methods:
        for kind, tokens in trained_tokens(plan, method).items():
            totals[kind] += tokens
    hours = {kind: tokens / tokens_per_second / 3600 / max(1, jobs) for kind, tokens in totals.items()}
    for kind in KINDS:
        count = sum(trial.kind == kind for trial in plan.trials)
        print(f"{kind}: {count} trials, {totals[kind] / 1e6:,.1f}M tokens, {hours[kind]:.1f} h")
    print(f"in all: {len(plan.trials)} trials, {sum(totals.values()) / 1e6:,.1f}M tokens, {sum(hours.values()):.1f} h")
