"""Names in knockout.json and knockout.safetensors."""

CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")  # part of every knockout
SETS = ("incorrect", "correct")
CONTROLS = ("random", "distance", "mass", "matched")  # "random" is part of every knockout
BALANCE = ("size", "distance", "seen", "mass", "overlap")
GROUPS = ("itself", "correct", "incorrect", "other", "no_image")
CASE_KEYS = ("image", "patches", "anchors", "correct_class")  # fields of a case in knockout.safetensors
