"""Pure protocol cores: events and `now` in, effects out. Nothing here awaits, reads a clock or does I/O."""
