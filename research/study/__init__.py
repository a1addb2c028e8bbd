"""The controlled study: every projector under the same conditions, its statistics and its report."""
