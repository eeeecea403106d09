"""What every test may count on."""

import signal


def pytest_configure():
    """SIGINT is heard, also in a shell's background job, which starts with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
