"""Where runs compute: devices, precision, and processes of commands."""
