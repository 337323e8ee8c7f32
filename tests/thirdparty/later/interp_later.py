"""Uses what does not exist yet."""

import interp_core as ic

Future = ic.FutureMethod
