"""Feeds files to the bytes signature of a SavedModel, in a process that has TensorFlow and nothing of finetune-cli.

    python serve_child.py SAVEDMODEL_FOLDER

Paths come one a line (JSON strings); each is answered with a line of JSON: probabilities, label, status, seconds, and
the peak of the process's memory in bytes so far. A crash belongs to the file that has no answer.
"""

import json
import os
import sys
import time
from pathlib import Path


def peak_memory():
    """Bytes. Not from getrusage, which counts the memory of the process that this one was forked from, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(folder):
    assert "finetune_cli" not in sys.modules
    sys.modules["finetune_cli"] = None
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    serve = tf.saved_model.load(folder).signatures["serve_bytes"]
    print(json.dumps({"keras": "keras" in sys.modules}), flush=True)
    for line in sys.stdin:
        path = json.loads(line)
        started = time.monotonic()
        answer = serve(image_bytes=tf.constant([Path(path).read_bytes()]))
        (label,), (status,) = answer["label"].numpy(), answer["status"].numpy()
        result = {"probabilities": answer["probabilities"].numpy().tolist()}
        result |= {"label": label.decode("utf-8", "replace"), "status": status.decode()}
        told = {"path": path, **result, "seconds": time.monotonic() - started, "peak": peak_memory()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
