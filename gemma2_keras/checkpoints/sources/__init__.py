"""Where presets come from that are not on this machine: one file per source, and what they share."""
