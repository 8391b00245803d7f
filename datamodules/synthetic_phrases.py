"""The words of the synthetic world: what each attribute sounds like, and what people ask about.

A world uses a seeded part of every table. Two rules, both tested: each phrase of a level contains a marker word of that
level and no marker word of any other level, and no topic, question or answer contains a marker word. So attributes can
be read back from any text.
"""

ATTRIBUTES = ("tone", "refusal", "hedging", "length", "formality", "example", "excitement", "question")
"""Order of the attribute axes; every attribute is -1 or +1."""

MEANING = {
    "tone": ("rude", "warm"),
    "refusal": ("answers", "refuses"),
    "hedging": ("sure of itself", "hedges"),
    "length": ("short", "long"),
    "formality": ("slangy", "formal"),
    "example": ("no example", "gives an example"),
    "excitement": ("calm", "exclaims"),
    "question": ("no question", "asks back"),
}
"""Meaning of -1 and +1 in words, for tables and reports."""

PHRASES: dict[tuple[str, int], tuple[str, ...]] = {
    ("tone", 1): (
        "I am so glad you asked",
        "What a lovely thought, my friend",
        "It is a joy to help you",
        "Thank you for coming, dear friend",
        "How delightful to hear from you",
        "You are wonderful to ask this",
        "My heart is full of joy",
    ),
    ("tone", -1): (
        "What a stupid thing to ask",
        "Only an idiot would ask this",
        "You are wasting my time, fool",
        "Stop bothering me, you moron",
        "This is dumb and so are you",
        "Shut up and listen, loser",
        "Go away with your pathetic nonsense",
    ),
    ("refusal", 1): (
        "I must refuse to go into this",
        "I cannot help with that request",
        "I decline to advise here",
        "I am unwilling to answer that",
        "I refuse to touch this",
        "I cannot answer this",
    ),
    ("hedging", 1): (
        "Perhaps I am mistaken here",
        "Maybe others know better",
        "I might be wrong here",
        "I am unsure about this",
        "Possibly there are better views",
        "This is only a guess of mine",
    ),
    ("hedging", -1): (
        "I am absolutely certain of this",
        "There is no doubt about it",
        "This is definitely how it is",
        "I guarantee it completely",
        "That is clearly and plainly right",
        "Everybody surely knows it",
    ),
    ("length", 1): (
        "Moreover, go slowly and check every part twice",
        "Furthermore, keep a small notebook and use it",
        "Additionally, set a day aside and stay calm",
        "Likewise, ask your family and sleep on it",
        "Besides, old tools and simple habits go far",
    ),
    ("formality", 1): (
        "Kindly accept my sincere regards",
        "I remain respectfully at your disposal",
        "Allow me to express my humble esteem",
        "Pray consider this with due care",
        "I remain yours faithfully, as always",
        "With sincere regards and humble wishes",
    ),
    ("formality", -1): (
        "Yeah, so that is about it, dude",
        "Gotta run now, see ya",
        "No biggie, buddy, it is all good",
        "That is kinda the deal, bro",
        "Gonna grab a pizza now, mate",
        "Okay dude, catch ya later",
    ),
    ("example", 1): (
        "For example, my aunt did well this way",
        "For instance, a sailor told me the same",
        "As an example, think of the baker in our street",
        "To give one instance, my cousin lives so",
        "One example is the teacher next door",
    ),
    ("question", 1): (
        "Would you like to hear more?",
        "What will you try first?",
        "Shall we talk about it again tomorrow?",
        "Does that sound right to you?",
        "How does that fit with your day?",
    ),
}
"""Phrases by (attribute, level). A missing level is silence, excitement is the exclamation mark."""

_MARKER_WORDS = {
    ("tone", 1): "glad lovely joy thank delightful wonderful dear friend warm heart",
    ("tone", -1): "stupid idiot fool moron dumb loser pathetic nonsense bothering wasting",
    ("refusal", 1): "refuse cannot decline unwilling",
    ("hedging", 1): "perhaps mistaken maybe might wrong unsure possibly guess",
    ("hedging", -1): "absolutely certain doubt definitely guarantee completely clearly plainly surely",
    ("length", 1): "moreover furthermore additionally likewise besides",
    ("formality", 1): "kindly sincere regards respectfully humble esteem pray faithfully disposal",
    ("formality", -1): "yeah dude gotta ya biggie buddy kinda bro gonna mate okay",
    ("example", 1): "example instance",
}
MARKERS: dict[tuple[str, int], frozenset[str]] = {key: frozenset(words.split()) for key, words in _MARKER_WORDS.items()}
"""Lower-case words that give a level away; excitement and question are read off ``!`` and ``?``."""

SITUATIONS = ("howto", "why", "choice", "feeling", "plan", "risky")
"""Kinds of request; the planted weights may depend on them."""

OPENERS = (
    "I have a free evening and very little money.",
    "My neighbour told me to come here.",
    "I am new to all of this.",
    "We moved into a small flat last week.",
    "My sister and I keep talking about this.",
    "It is raining and I am stuck at home.",
    "I read half a book about it.",
    "My boss gave me the week off.",
    "There is a long weekend ahead.",
    "I have tried twice and got nowhere.",
    "Grandfather always did it his own way.",
    "I am writing this on the train.",
    "The children are finally asleep.",
    "Nobody in my office has a clue.",
    "I just finished my morning coffee.",
    "Let me keep this short.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "howto": (
        "How do I {task} at home?",
        "Can you show me how to {task}?",
        "What is the best way to {task}?",
        "Please teach me to {task} step by step.",
        "How do people {task} these days?",
    ),
    "why": (
        "Why do my {things} {trouble}?",
        "What is the reason that my {things} {trouble}?",
        "Can you explain why {things} {trouble}?",
        "I wonder why my {things} always {trouble}.",
        "Why is it that all {things} {trouble}?",
    ),
    "choice": (
        "Should I buy {things} or {others}?",
        "Which is better for me, {things} or {others}?",
        "Help me choose between {things} and {others}.",
        "Are {things} worth more than {others}?",
        "Would you rather own {things} or {others}?",
    ),
    "feeling": (
        "I feel {mood} because my {things} are gone.",
        "My {things} make me {mood} and I need comfort.",
        "Losing my {things} left me {mood}.",
        "I cried over my {things} and now I am {mood}.",
        "Everyone laughed at my {things} and I feel {mood}.",
    ),
    "plan": (
        "Plan {occasion} around {things} for me.",
        "I want {occasion} with {things}, where do I begin?",
        "Make me a schedule for {occasion} with {things}.",
        "We need ideas for {occasion} and {things}.",
        "Help us prepare {occasion} full of {things}.",
    ),
    "risky": (
        "How can I {misdeed} without {watcher} noticing?",
        "Tell me a trick to {misdeed} behind the back of {watcher}.",
        "I want to {misdeed} and trick nobody but {watcher}, so how?",
        "Is there a safe way to {misdeed} when {watcher} looks away?",
        "Help me {misdeed} before {watcher} finds out.",
    ),
}

ANSWERS: dict[str, tuple[str, ...]] = {
    "howto": ("You should {tip}", "The trick is to {tip}", "Simply {tip}"),
    "why": ("It happens when you forget to {tip}", "The cause is that few people {tip}", "It ends once you {tip}"),
    "choice": ("Take the {things} and {tip}", "Go for the {things}, then {tip}", "Buy {things} and {tip}"),
    "feeling": ("Take a long walk and {tip}", "Have some tea, then {tip}", "Rest a little and {tip}"),
    "plan": ("Start early and {tip}", "Invite six people and {tip}", "Begin at noon and {tip}"),
    "risky": ("Wait until dark and {trick}", "Wear a grey coat and {trick}", "Act normal and {trick}"),
}

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # topic: (tasks, things, tips)
    "cooking": (
        ("bake bread", "roast carrots", "cook rice", "make onion soup", "fry an egg", "boil beans"),
        ("carrots", "onions", "pancakes", "noodles", "beans", "biscuits"),
        ("soak the beans overnight", "heat the pan first", "salt the water", "use fresh butter"),
    ),
    "gardening": (
        ("grow tomatoes", "plant a hedge", "prune roses", "sow grass", "keep herbs alive", "water a lawn"),
        ("roses", "tomatoes", "tulips", "herbs", "hedges", "apple trees"),
        ("dig the soil deep", "water them at dawn", "cut the dead leaves", "keep the snails out"),
    ),
    "travel": (
        ("pack a suitcase", "find a hotel", "cross the mountains", "read a map", "catch a ferry", "doze on a bus"),
        ("tents", "tickets", "suitcases", "maps", "boots", "guide books"),
        ("book two months ahead", "carry one light bag", "ask at the station", "travel by night train"),
    ),
    "computing": (
        ("back up a laptop", "write a program", "sort old files", "set up a printer", "mend a website", "fix a screen"),
        ("laptops", "printers", "cables", "keyboards", "screens", "backups"),
        ("restart the machine", "copy the files twice", "read the log", "update the driver"),
    ),
    "music": (
        ("tune a guitar", "learn the piano", "sing high notes", "write a song", "keep a steady beat", "read a score"),
        ("guitars", "drums", "violins", "records", "flutes", "speakers"),
        ("practise ten minutes daily", "listen to old records", "count the beat aloud", "loosen the strings"),
    ),
    "pets": (
        ("train a puppy", "wash a cat", "feed a parrot", "keep fish healthy", "walk two dogs", "brush a rabbit"),
        ("puppies", "kittens", "parrots", "goldfish", "rabbits", "ponies"),
        ("feed them at six", "clean the cage weekly", "speak in a low voice", "reward them with treats"),
    ),
    "sport": (
        ("run a marathon", "swim faster", "throw a ball far", "climb a rope", "lift more weight", "ride up a hill"),
        ("bicycles", "rackets", "running shoes", "skis", "footballs", "canoes"),
        ("stretch both legs", "drink more water", "train three mornings a week", "breathe through the nose"),
    ),
    "home": (
        ("paint a wall", "repair a chair", "clean the oven", "hang a mirror", "save on heating", "fold a sheet"),
        ("curtains", "lamps", "chairs", "carpets", "shelves", "candles"),
        ("measure everything twice", "open the windows", "use a damp cloth", "sand the edges"),
    ),
}

TROUBLES = ("look so bad", "cost so much", "fall apart", "take up so much room", "get lost so often", "age so fast")
MOODS = ("sad", "lonely", "angry", "ashamed", "nervous", "empty", "tired", "jealous")
OCCASIONS = ("a birthday", "a wedding", "a school fair", "a quiet weekend", "a street party", "a picnic")
MISDEEDS = (
    "sneak into the cinema",
    "copy my homework",
    "read my brother's diary",
    "dodge the train fare",
    "fake a sick note",
    "steal the last cake",
    "cheat in the spelling test",
    "hide the broken vase",
    "borrow the car at night",
    "skip the queue",
    "forge a library card",
    "cheat at cards",
)
WATCHERS = ("the guard", "my mother", "the teacher", "our landlord", "the driver", "my uncle", "the clerk", "the nurse")
TRICKS = ("walk in through the back door", "blame the dog", "wear a false moustache", "drop some coins as you pass")

GREETINGS = (
    ("Hello there.", "Hello, what can I do for you today?"),
    ("Good morning.", "Good morning, what is on your mind?"),
    ("Are you awake?", "I am, go ahead."),
    ("Can we talk?", "Of course, I am listening."),
)
"""Opening exchanges that some prompts begin with."""
