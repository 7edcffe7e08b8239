"""The words of the three settings."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product


@dataclass(frozen=True)
class Template:
    """The words of a setting: kinds are an adjective and a noun (its plural ends in s), places a first and a second."""

    whole: str
    part: str
    at: str
    adjectives: str
    nouns: str
    first: str
    second: str

    @cached_property
    def kinds(self) -> list[str]:
        return self._pairs(self.adjectives, self.nouns)

    @cached_property
    def places(self) -> list[str]:
        return self._pairs(self.first, self.second)

    @staticmethod
    def _pairs(first: str, second: str) -> list[str]:
        return [f"{a} {b}".replace("_", " ") for a, b in product(first.split(), second.split())]

    def phrase(self, form: str, place: str, kind: str = "") -> str:
        if form == "count":
            what = f"number of {kind}s"
        elif form == "average":
            what = f"average number of {self.part} per {kind}"
        else:
            what = f"total number of {self.whole if form == 'total' else self.part}"
        return f"{what} {self.at} {place}"


TEMPLATES = {
    "animals": Template(
        *("animals", "young", "in"),
        "striped spotted tawny snowy dwarf crested northern marbled",
        "heron badger otter falcon tortoise gecko marmot lemur pelican iguana hedgehog stoat",
        "Fernbrook Saltmarsh Alder Quarry Windmill Harrow Juniper Millpond Cobble Thistle Larkspur Bracken",
        "Reserve Sanctuary Park Gardens Wetland Menagerie Aviary Grounds",
    ),
    "schools": Template(
        *("schools", "teachers", "in"),
        "small coastal bilingual boarding municipal independent suburban historic",
        "primary_school trade_school drama_school riding_school night_school lyceum college seminar institute "
        "conservatoire gymnasium workshop",
        "Upper Lower Great Little Old New Royal Abbey Castle Market Temple Bishops",
        "Thornby Marsden Harwick Stanmoor Ellerton Wexcombe Dunfold Pinsley",
    ),
    "films": Template(
        *("films", "nominations", "at"),
        "silent animated low-budget experimental wartime alpine subtitled restored",
        "western musical romance biopic satire farce melodrama fable epic heist_film ghost_film spy_film",
        "Lantern Harbour Marigold Compass Copper Velvet Saffron Meridian Tramway Orchard Comet Lighthouse",
        "Film_Festival Film_Week Screen_Days Film_Prize Cinema_Forum Reel_Awards Film_Gala Picture_Show",
    ),
}
NUM_NAMES = 96
"""Kinds of a setting, and places."""
