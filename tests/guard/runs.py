"""Observations of runs that never were: a level, its noise, and what goes wrong."""

import random
from collections.abc import Callable

from hf_stable.guard import Action, Decision, Guard, Observation, Rollback
from hf_stable.recipes import GuardRecipe

ALL = ["skip", "lower", "rollback"]
SIGMA = 0.05  # nats, of every noise below

Noise = Callable[[random.Random], float]


def gaussian(draw: random.Random) -> float:
    return draw.gauss(0, 1)


def laplace(draw: random.Random) -> float:
    return draw.choice((-1, 1)) * draw.expovariate(2**0.5)


def student(draw: random.Random) -> float:
    """Eight degrees of freedom, scaled to variance 1."""
    return draw.gauss(0, 1) / (draw.gammavariate(4, 2) / 8) ** 0.5 / (8 / 6) ** 0.5


def contaminated(draw: random.Random) -> float:
    """One batch in ten is three times as noisy."""
    return draw.gauss(0, 3 if draw.random() < 0.1 else 1) / 1.8**0.5


NOISES: dict[str, Noise] = {
    "gaussian": gaussian,
    "laplace": laplace,
    "student": student,
    "contaminated": contaminated,
}


def power_law(step: int) -> float:
    """A loss as it falls: 10 nats at first, 4 after 100 steps, 2.8 after 10,000."""
    return 2.5 + 7.5 * step**-0.35


def clean(steps: int, noise: Noise, seed: int = 0, *, falling: bool = True) -> list[Observation]:
    """Steps from 1 on without anything wrong; norms vary by a tenth."""
    draw = random.Random(seed)
    return [
        Observation(
            step,
            (power_law(step) if falling else 3.0) + SIGMA * noise(draw),
            0.5 * 2.718 ** (0.1 * noise(draw)),
            2.718 ** (0.05 * noise(draw)),
        )
        for step in range(1, steps + 1)
    ]


def with_loss(seen: Observation, loss: float) -> Observation:
    return Observation(seen.step, loss, seen.grad_norm, seen.update_norm)


def judged(observations: list[Observation], settings: GuardRecipe) -> list[Decision]:
    guard = Guard(settings)
    return [guard.judge(seen) for seen in observations]


def actions(decisions: list[Decision]) -> list[Action]:
    return [decision.action for decision in decisions]


def train(
    settings: GuardRecipe,
    steps: int,
    observe: Callable[[int, int], Observation],
    checkpoint_every: int = 50,
) -> tuple[list[Observation], list[Decision], list[Rollback]]:
    """A loop as training has it, with checkpoints of the guard in memory.

    Args:
        observe: of (step, batch number), where a batch number counts those that were left out.
    """
    guard, saved, step = Guard(settings), {0: Guard(settings).state_dict()}, 0
    log, decisions, rollbacks = [], [], []
    left_out: list[tuple[int, int]] = []
    while step < steps:
        batch = step + 1
        for first, last in sorted(left_out):
            batch += last - first + 1 if batch >= first else 0
        seen = observe(step + 1, batch)
        decision = guard.judge(seen)
        log.append(seen)
        decisions.append(decision)
        if decision.action == "give_up":
            break
        if decision.action == "rollback":
            to = max(at for at in saved if at <= decision.rollback_to)
            saved = {at: state for at, state in saved.items() if at <= to}
            left_out.append((decision.skip_first, decision.skip_last))
            rollbacks.append(Rollback(seen.step, to, (0, 1), decision.reason, 0))
            guard, step = Guard(settings), to
            guard.load_state_dict(saved[to])
            guard.after_rollback(rollbacks)
            continue
        step += 1
        if step % checkpoint_every == 0:
            saved[step] = guard.state_dict()
    return log, decisions, rollbacks
