"""Colours of the objects and surfaces of the scenes."""

# Paired surfaces: both classes of a pair share a colour.
TOP = (136, 148, 184)
SIDE = (184, 148, 124)
GROUND = (116, 104, 108)
BODY = (190, 78, 74)
PANE = (148, 176, 196)
STEEL = (176, 176, 182)
HEADLIGHT = (252, 236, 160)
TAIL_LIGHT = (236, 120, 60)
CREAM = (226, 214, 194)
LINEN = (246, 240, 228)
BRASS = (206, 164, 78)
WALNUT = (104, 62, 40)
INK = (44, 40, 48)
# window panes, with the same probability in rooms and streets
LIT = (246, 204, 112)
DARK = (92, 128, 178)
DUSK = (232, 190, 150)
SUN = (252, 240, 206)
MOON = (250, 244, 220)
MOON_SPOT = (232, 222, 192)
BULB = (255, 246, 214)
LAMP_SHADE = (236, 178, 72)
LIT_LAMP_SHADE = (248, 208, 110)
BARK = (88, 60, 44)
LEAF = (72, 128, 84)
SHIRTS = (
    (206, 104, 58),
    (52, 128, 138),
    (172, 156, 68),
    (120, 92, 158),
)
SKINS = (
    (226, 178, 146),
    (168, 116, 84),
    (122, 80, 58),
)
HAIRS = (
    (58, 40, 34),
    (126, 82, 46),
    (34, 32, 38),
)
HILLS = (
    (92, 132, 92),
    (70, 104, 132),
    (150, 96, 92),
)
