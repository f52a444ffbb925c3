import logging
import time

from bn_det.population.progress import with_progress


def test_what_is_done_and_the_time_left(monkeypatch, caplog):
    """Batches of 2, each 3 seconds long by the clock."""
    clock = iter(range(0, 10**6, 3))
    now = next(clock)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = logging.getLogger("bn_det.test")
    found = []
    with caplog.at_level(logging.INFO, "bn_det.test"):
        for batch in with_progress([[0, 1], [2, 3], [4, 5]], 10, logger, "Done %d/%d", len):
            found += batch
            now = next(clock)
    assert found == list(range(6))
    # After 6 of 15 seconds; the next line would be due at 11.
    assert caplog.messages == ["Done 4/10. ETA=0:00:09"]
