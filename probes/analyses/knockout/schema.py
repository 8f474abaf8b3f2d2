"""Names in knockout.json and knockout.safetensors."""

CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")
SETS = ("incorrect", "correct")
# fields of a case in knockout.safetensors
CASE_KEYS = ("image", "patches", "anchors", "correct_class")
