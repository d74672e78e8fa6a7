"""The one exception a user's mistake raises.

The command line prints its message on one line and exits with code 2; a library caller catches it as a
``ValueError``. Broken invariants of our own stay ``assert``: they are bugs, not mistakes of the user.
"""

__all__ = ["PeerError", "TidarError"]


class TidarError(ValueError):
    """What the user can mend; the message names the remedy."""


class PeerError(TidarError):
    """Another process of the same run has failed, and says why; this one ends without a word."""
