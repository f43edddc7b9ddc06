"""A run of the benchmarks that is interrupted and goes on."""

import pytest


def interrupt_and_go_on(stream, data, out, at):
    """Interrupt a run where its report has the words ``at``, and start it again.

    Returns:
        The record, the reports before the interruption, the suffixes of the files that it left, and the
        reports after it.
    """
    before, after = [], []

    def interrupt(where, share):
        before.append((where, share))
        if at in where:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stream.record(data, out, 0, report=interrupt)
    left = [path.suffix for path in out.iterdir()]
    record = stream.record(data, out, 0, report=lambda where, share: after.append((where, share)))
    return record, before, left, after
