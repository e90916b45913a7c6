"""``python -m emjax.status RUN``: how far a prediction is, from the ledger beside its output."""

import time

from emjax import cli
from emjax.errors import UserError
from emjax.inference.ledger import Ledger, read_plan
from emjax.inference.progress import duration
from emjax.inference.segmentation import Places
from emjax.inference.streaming import work_folder


def stage_lines(location: str, stage: str, facts: dict, now: float) -> tuple[list[str], int]:
    """What to print about one stage, and how many of its blocks failed."""
    book = Ledger(location, stage, facts["hash"])
    state = book.progress(int(facts["blocks"]))
    lines = [f"{stage}: {state.done} of {state.total} blocks done, {state.failed} failed"]
    if state.done:
        elapsed = max(state.last - state.first, 1e-6)
        rate = state.voxels / elapsed / 1e6
        hosts = ", ".join(state.hosts)
        lines.append(f"  {state.voxels / 1e6:.1f} MVox in {duration(elapsed)}, {rate:.3g} MVox/s, on {hosts}")
        lines.append(f"  last block {duration(max(now - state.last, 0))} ago")
        left = int(facts["voxels"]) - state.voxels
        if left > 0 and rate:
            lines.append(f"  about {duration(left / 1e6 / rate)} left at that speed")
    for name in sorted(book.failed())[:10]:
        failure = book.failure(name)
        reason = str(failure.get("error", "?")).strip().splitlines()[-1]
        where = f"{failure.get('attempts', '?')} attempts, last on {failure.get('host', '?')}"
        lines.append(f"  failed: block {name}, {where}: {reason}")
    return lines, state.failed


def main(arguments: list[str]) -> int:
    """Runs the command; 0 if all is done, 1 if blocks failed, 0 while it is on its way."""
    parser = cli.parser("status", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help="the output of emjax.predict or emjax.segment")
    options = parser.parse_args(arguments)
    location = options.run
    plan = read_plan(location)
    if plan is None:
        location = work_folder(Places(options.run))
        plan = read_plan(location)
    if plan is None:
        raise UserError(f"{options.run}: no ledger there; expected the output of emjax.predict or emjax.segment")
    print(f"{options.run}: plan {plan['hash']}, begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(plan['begun']))}")
    for key in ("input", "affinities", "system"):
        if key in plan["content"]:
            print(f"  {key}: {plan['content'][key]}")
    failed = 0
    for stage, facts in plan["stages"].items():
        lines, count = stage_lines(location, stage, facts, time.time())
        failed += count
        print("\n".join(lines))
    return cli.FAILED if failed else cli.DONE


if __name__ == "__main__":
    cli.run(main)
