"""How a process deals with the memory that it frees."""

import ctypes

# malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MAPPED_APART_BYTES = 1 << 30
_NEVER_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back to the kernel each time; return whether the C library can.

    By default every array above 32 MB is mapped from the kernel anew, and freshly mapped pages are zeroed and faulted in one by one, which
    virtual machines make dear. A training step allocates and frees the same few gigabytes again and again. The process then keeps what it needed at
    its peak. Affects only speed and memory. For processes that do one thing, as workers do, not for a library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAPPED_APART_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES))
