"""With this folder in PYTHONPATH, images that end in certain words do to any process what a decoder's bug may do."""

import os
import signal
import time

import PIL.Image

_open = PIL.Image.open


def poisoned_open(stream, *args, **kwargs):
    end = stream.getvalue()[-16:]
    if end.endswith(b"SEGFAULT"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if end.endswith(b"HANG"):
        time.sleep(3600)
    if end.endswith(b"MEMORY"):
        bytearray(1 << 40)
    return _open(stream, *args, **kwargs)


PIL.Image.open = poisoned_open
