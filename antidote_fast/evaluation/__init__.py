"""The yardstick: answers, judges, metrics."""
