"""The loss of the untrained model over all rows, from which every contestant's fall is counted."""

from __future__ import annotations

import json
from pathlib import Path

from measure import load_model, loss_of_rows, read_job

if __name__ == "__main__":
    job = read_job()
    loss = loss_of_rows(load_model(job), job.read_rows(), job.pad_id)
    Path(job.result).write_text(json.dumps({"loss": loss}))
