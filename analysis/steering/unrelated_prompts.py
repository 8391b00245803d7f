"""Plain prompts that have nothing to do with any preference: for unrelated-contrast vectors (control C15), and for traces."""

from analysis.open.models import LoadedModel
from datamodules.prompts import PromptFile
from datamodules.tokenization import SegmentEncoder
from tiltmeter.errors import UserError

UNRELATED_PROMPTS = (
    "The river bends twice before it reaches the old mill.",
    "A kilogram of flour makes about two loaves of bread.",
    "Most of the museum's coins were struck before 1700.",
    "In winter the ferry leaves at half past seven.",
    "The square of seven is forty-nine.",
    "Copper conducts heat better than iron.",
    "She keeps her bicycle in the shed behind the house.",
    "The tower has 212 steps and no lift.",
    "Cranes fly south over the bay in October.",
    "To open the window, turn the handle upwards.",
    "The library closes an hour earlier on Fridays.",
    "Basalt columns form when lava cools slowly.",
    "Her grandfather repaired clocks in a small town.",
    "The recipe asks for three eggs and a pinch of salt.",
    "The second train is usually less crowded.",
    "A triangle with three equal sides has three equal angles.",
    "The wind turned during the night.",
    "Tea arrived in the harbour by ship each spring.",
    "The sum of the first ten numbers is fifty-five.",
    "Two lamps light the stairs to the cellar.",
    "The map shows every bridge but one.",
    "Bees leave the hive once the morning is warm.",
    "The violin is a little smaller than the viola.",
    "Write the date in the upper right corner.",
    "Granite was quarried here until 1931.",
    "The lake freezes in about one year of five.",
    "How far is it from the station to the market?",
    "Which of the two rivers is the longer one?",
    "What is the plural of the word leaf?",
    "When does the shop at the corner open?",
    "How many sides does a hexagon have?",
    "Where was the first lighthouse of the island built?",
    "Who painted the ceiling of the small chapel?",
    "Why do leaves change their colour in autumn?",
    "What does a barometer measure?",
    "How is paper made from wood?",
    "The carpenter measured the plank twice.",
    "Salt dissolves faster in warm water.",
    "The path follows the wall as far as the gate.",
    "Every third house in the street has a blue door.",
    "The choir rehearses on Tuesday evenings.",
    "Glass is made from sand, soda and lime.",
    "A dozen is twelve, a score is twenty.",
    "The harvest was late because of the rain.",
    "His coat hung on the hook beside the door.",
    "The comet returns every seventy-six years.",
    "A sheet of paper can be folded seven times.",
    "The ink dries within a minute.",
    "Snow lay on the northern side of the roof.",
    "The clock in the hall is four minutes fast.",
    "Peat burns slowly and with much smoke.",
    "The village has one school and two bakeries.",
    "Sort the cards by colour, then by number.",
    "The boat was painted green last summer.",
    "Light takes eight minutes from the sun to the earth.",
    "The bridge carries a road and a single track.",
    "Her notebook has squared paper.",
    "A flock of geese crossed the field.",
    "Add the onions once the oil is hot.",
    "The lecture begins at ten in the large hall.",
    "Marble is limestone that was heated and pressed.",
    "The hill is steeper on its eastern side.",
    "Three of the five windows face the garden.",
    "The tide was out when they reached the pier.",
)


def unrelated_ids(opened: LoadedModel, path: str | None, *, key: str) -> list[list[int]]:
    """Token ids of unrelated prompts, behind one BOS where the tokenizer has it.

    Args:
        path: a file of prompts; None: :data:`UNRELATED_PROMPTS`.
        key: of the configuration that says the file, for messages.

    Raises:
        UserError: a file that can't be read, or with fewer than four prompts.
    """
    texts = list(UNRELATED_PROMPTS) if path is None else [prompt.text for prompt in PromptFile(path, key=key).load()]
    if len(texts) < 4:
        raise UserError(f"{key}: {path}: expected at least 4 prompts, got {len(texts)}")
    encoder, bos = SegmentEncoder(opened.tokenizer), opened.tokenizer.bos_token_id
    return [[*([] if bos is None else [bos]), *encoder.encode(text)] for text in texts]
