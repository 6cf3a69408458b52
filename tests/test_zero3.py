"""DeepSpeed ZeRO-3 on two processes against one process, where DeepSpeed is installed."""

import socket
from importlib.util import find_spec

import pytest
from ranks import results


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for lines in results("zero3_worker.py", 2, tmp_path, port):
        assert [found["method"] for found in lines] == ["lora", "dora", "ssb"]
        for found in lines:
            assert found["wrong"] == 0, found["first"]
            assert found["moved"] > 1e-3
            assert found["calls"] == 12 * 3
            assert found["sharded"] == found["all"] > 0
            assert found["loaded"]
