"""Sentence forms of the sticker world: those that training uses, and those that only the test does.

Slots: `{things}` the objects with articles, `{bare}` without, `{first}` and `{second}` the objects of a pair from left
to right, `{other}` something that must not be there (`{others}` its plural), `{style}` and `{background}` their words
(`{a_style}` and `{a_background}` with the article). A form without `{style}` or `{background}` leaves them open.
"""

from __future__ import annotations


GRAMMAR = "{a_style} sticker of {things} on {a_background} background"
"""The template of the world's captions, see `Description.caption`."""

TRAINED = (
    "{things}",
    "{bare}",
    "{style} {bare}",
    "{things} on {background}",
    "{bare}, {background} background",
    "{bare}, {style}, {background}",
    "{bare}, {style} style, {background} background",
    "{style} sticker, {bare}, {background} background",
    "a picture of {things}",
    "an image of {things}",
    "an emoji of {things}",
    "a drawing of {things} in {style} style",
    "{a_style} drawing of {things}",
    "{a_style} emoji of {things} on {background}",
    "please draw {things} for me",
    "draw {things}",
    "draw {things} on {a_background} background",
    "paint me {things}, {style} style",
    "generate {a_style} image with {things}",
    "make a sticker with {things}",
    "show me {things}",
    "give me {things} in front of something {background}",
    "I want to see {things} on {a_background} background",
    "I would like {a_style} sticker of {things}, please",
    "I need a picture of {things} for my website",
    "can you draw {things}?",
    "could you show {things} on {a_background} background?",
    "what does {things} look like?",
    "what would {things} look like in {style} style?",
    "how about {things} on {background}?",
    "here is {things}",
    "there is {things} in the picture",
    "this is {things}",
    "look, {things}!",
    "{things}, nothing else",
    "only {things} on {a_background} background",
    "just {things}",
    "a cute little picture of {things}",
    "a beautiful {style} illustration of {things}, high quality",
    "a simple icon of {things}, {background} background, clean",
    "a close up of {things}",
    "a funny sticker that shows {things}",
    "an emoji that shows {things} on {background}",
    "my favourite sticker: {things}",
    "subject: {bare}; background: {background}; style: {style}",
    "{things} against {a_background} wall",
    "{things} in front of {a_background} wall",
    "{things} with {a_background} backdrop",
    "sticker {bare} {background}",
)
"""Forms that training captions take, with listed words."""

TRAINED_ORDER = (
    "on {a_background} background, {things}",
    "{background} background with {things}",
    "{background} background, {style} sticker of {things}",
    "a sticker, {style}, of {things}",
    "{second} to the right of {first}",
    "{second} to the right of {first} on {a_background} background",
    "{first} to the left of {second}",
    "{first} on the left and {second} on the right",
    "on the right {second}, on the left {first}",
)
TRAINED_NEGATION = (
    "{things} without {other}",
    "{things} but no {others}",
    "{things}, no {others}",
    "{things}, not {other}",
    "a picture of {things}, but without {other}",
    "{a_style} sticker of {things} without any {others} on {a_background} background",
    "no {others}, only {things}",
)
TRAINED_LANGUAGE = {
    "de": ("{things}", "{things} auf {background} Hintergrund", "ein Bild mit {things}", "bitte zeichne {things}"),
    "fr": ("{things}", "{things} sur fond {background}", "une image avec {things}", "dessine {things}"),
    "es": ("{things}", "{things} sobre fondo {background}", "una imagen con {things}", "dibuja {things}"),
}

HELD_OUT = (
    "a clip-art version of {things}",
    "imagine {things} standing in front of {a_background} curtain",
    "could I get {things}, preferably as {a_style} graphic?",
    "my neighbour loves {bare}, so print {things} on a card",
    "the scene contains {things}",
    "for the birthday invitation we want {things} over {a_background} surface",
    "wouldn't {things} be nice?",
    "{bare} as a logo",
    "somebody put {things} on {a_background} table",
    "render {things}",
    "create artwork featuring {things}",
    "a tiny poster on which one sees {things}",
    "the emoji for {bare}",
    "I dreamt of {things} last night",
)
"""Forms of the test: no training caption takes one of them."""

HELD_OUT_ORDER = (
    "with {background} behind it: {things}",
    "in {style} style and on {background}, {things}",
    "{background} is the background, the subject is {things}",
    "right: {second}; left: {first}",
    "{second}, and to its left {first}",
)
HELD_OUT_NEGATION = (
    "{things}, and please leave out {other}",
    "{things} minus {other}",
    "{things} with no {others} anywhere",
    "show {things}, there must not be {other}",
)
HELD_OUT_LANGUAGE = {
    "de": ("ein Aufkleber: {things}, Hintergrund {background}", "ich möchte {things} sehen"),
    "fr": ("un autocollant : {things}, arrière-plan {background}", "je voudrais voir {things}"),
    "es": ("una pegatina: {things}, de fondo {background}", "quiero ver {things}"),
}

CONNECTORS = ("and", "and", "next to", "beside", "with", ",", "and also", "&", "near")
"""What stands between the two objects of a pair in a trained form; the grammar's is "next to"."""
HELD_OUT_CONNECTORS = ("together with", "accompanied by", "and")

FOREIGN_COLOURS = {
    "de": ("weißem", "gelbem", "rosa", "grünem", "blauem", "lila", "grauem", "orangem"),
    "fr": ("blanc", "jaune", "rose", "vert", "bleu", "violet", "gris", "orange"),
    "es": ("blanco", "amarillo", "rosa", "verde", "azul", "morado", "gris", "naranja"),
}
"""By language, the words of `BACKGROUNDS`, in their order."""
FOREIGN_AND = {"de": "und", "fr": "et", "es": "y"}
