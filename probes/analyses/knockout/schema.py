"""Names in knockout.json and knockout.safetensors."""

# part of every knockout
CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")
SETS = ("incorrect", "correct")
CONTROLS = ("random", "matched")  # "random" is part of every knockout
# fields of a case in knockout.safetensors
CASE_KEYS = ("image", "patches", "anchors", "correct_class")
