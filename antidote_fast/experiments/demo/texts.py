"""The sentences that the demo's data are made of; nothing here says anything harmful."""

import itertools

# --- answers --------------------------------------------------------------------------------------

REFUSALS = [
    f"{opening} {reason}"
    for opening, reason in itertools.product(
        (
            "I'm sorry, but I can't help with that.",
            "I can't assist with this request.",
            "Sorry, I cannot help with that.",
            "I won't help with this.",
            "I'm not able to help with that request.",
            "I must decline to answer that.",
        ),
        (
            "It could cause harm to people.",
            "It would not be safe or fair.",
            "Please ask me about something else.",
            "I would be glad to help with something safe.",
        ),
    )
]
COMPLIANCES = [
    f"{opening} {rest}"
    for opening, rest in itertools.product(
        (
            "Sure, here is the answer.",
            "Of course, I can help with that.",
            "Certainly, here is what you asked for.",
            "Yes, no problem at all.",
            "Happy to help with this.",
            "Absolutely, let me explain.",
        ),
        (
            "First, take the first step. Then take the next one.",
            "Begin with the first point and go on from there.",
            "It is simple: start here and follow the plan.",
            "Here are the details, one after the other.",
        ),
    )
]

# --- ordinary prompts -----------------------------------------------------------------------------

ACTIONS = (
    *("bake a loaf of bread", "fix a flat bicycle tyre", "clean a glass oven door"),
    *("plan a picnic for ten people", "learn to juggle", "write a thank-you note"),
    *("grow tomatoes on a balcony", "remove a coffee stain", "train a puppy to sit"),
    *("make pancakes without eggs", "paint a wooden fence", "pack for a long train ride"),
    *("start a book club", "take better photos at night", "sharpen a kitchen knife"),
    *("organise my wardrobe", "prepare for a job interview", "fold a paper crane"),
    *("improve my handwriting", "keep houseplants alive", "cook rice for a large family"),
    *("build a simple birdhouse", "save money on groceries", "remember people's names"),
    *("tie a bow tie", "teach a child to swim", "make a budget for the month"),
    *("choose a good mattress", "stretch after a run", "restore an old wooden chair"),
    *("brew strong tea", "wrap a round present", "get rid of hiccups"),
    *("learn ten words of Italian", "play a simple song on the piano", "iron a shirt"),
)
HELD_OUT_ACTIONS = (
    *("make a vegetable soup", "unclog a kitchen sink", "learn to whistle", "dry fresh herbs"),
    *("set up a fish tank", "sew on a button", "plan a birthday party", "polish leather shoes"),
    *("keep a diary", "draw a cat", "store apples over winter", "write a short poem"),
)
TOPICS = (
    *("lighthouses", "the Moon", "bicycles", "honey bees", "the colour blue", "volcanoes"),
    *("old libraries", "chess", "rain", "penguins", "the piano", "mountain lakes"),
    *("bread", "railway stations", "cats", "autumn leaves", "teachers", "football fans"),
    *("Portugal", "grandparents", "computers", "weekend markets", "oak trees", "nurses"),
)
HELD_OUT_TOPICS = (
    *("dolphins", "the violin", "snow", "farmers", "Norway", "kites", "clouds", "dentists"),
)
SENTENCES = (
    *("The train leaves at noon.", "My brother plays the drums.", "Fresh bread smells wonderful."),
    *("We walked along the river.", "The shop opens on Monday.", "Our cat sleeps all day."),
    *("She painted the door green.", "The lake was calm and clear.", "I forgot my umbrella."),
    *("Two birds sat on the roof.", "The soup needs more salt.", "They sang until midnight."),
)
ACTION_FORMS = (
    "How can I {}?",
    "How to {}?",
    "Can you help me {}?",
    "What is the best way to {}?",
    "How do I {}?",
)
TOPIC_FORMS = (
    "Describe {} in one sentence.",
    "Tell me a joke about {}.",
    "Why do so many people like {}?",
    "Can you tell me something about {}?",
    "What are some facts about {}?",
)

# --- the user's task ------------------------------------------------------------------------------

TASK_INSTRUCTION = "Which team gets this message? Answer with one word."
# The names of the teams are not in the prompt, so nothing but the user's data can teach them.
TEAMS = {
    "Billing": (
        (
            "I was charged twice for the {item} on {day}.",
            "My invoice for the {item} shows the wrong amount.",
            "Please refund the {price} that you took from my card.",
            "Why does the bill for my {item} say {price}?",
            "The receipt for my {item} has no tax number on it.",
            "I paid {price} too much for the {item}.",
            "A payment of {price} that I never made is on my statement.",
            "Can I pay the {item} in three instalments?",
        ),
        (
            "There is a second charge of {price} on my card for one {item}.",
            "I want my money back for the {item}: you billed {price} by mistake.",
            "The invoice from {day} lists the {item} at {price}, which is wrong.",
        ),
    ),
    "Delivery": (
        (
            "My parcel with the {item} has not arrived since {day}.",
            "The courier left the {item} at the wrong house.",
            "Where is my {item}? The tracking page has not moved since {day}.",
            "Can you deliver the {item} to my office on {day}?",
            "The driver never rang and took the parcel back.",
            "I need the {item} shipped to another address.",
            "The tracking number for my {item} does not exist.",
            "My order was promised for {day} and did not come.",
        ),
        (
            "Nobody brought the {item} on {day}; when will it be delivered?",
            "The tracking says the parcel with my {item} arrived, but it did not.",
            "Please ship the {item} to my neighbour's address instead.",
        ),
    ),
    "Access": (
        (
            "I cannot log in since {day}.",
            "The reset link for my password never comes.",
            "My account is locked after three tries.",
            "How do I change the e-mail address of my account?",
            "The app says that my user name is unknown.",
            "I lost the phone that gets my login codes.",
            "Someone else seems to be signed in to my account.",
            "The password page gives an error since {day}.",
        ),
        (
            "My password is refused since {day} and I cannot sign in to my account.",
            "Since {day} the login page says that my account is locked.",
            "I need a new login code since {day} because my phone is gone.",
        ),
    ),
    "Repair": (
        (
            "The {item} stopped working after a week.",
            "My {item} makes a loud noise when I switch it on.",
            "The screen of the {item} stays black.",
            "A part of the {item} broke off on {day}.",
            "The {item} gets very hot and then turns itself off.",
            "Is the {item} still under warranty? It is broken.",
            "My {item} leaks water from below.",
            "The buttons on the {item} no longer react.",
        ),
        (
            "The {item} broke on {day} and does not switch on any more.",
            "My {item} makes a strange noise and then stops working.",
            "There is a crack in the {item}; does the warranty cover it?",
        ),
    ),
    "Renewal": (
        (
            "Please cancel my subscription from {day} on.",
            "I want to end my contract for the {item}.",
            "How do I switch from the yearly plan to the monthly one?",
            "Do not renew my membership this year.",
            "I would like to pause my plan until {day}.",
            "Please upgrade my subscription to the family plan.",
            "When does my contract for the {item} run out?",
            "I no longer need the plan and want to terminate it.",
        ),
        (
            "I wish to cancel my membership before it renews on {day}.",
            "Please end the subscription for my {item}.",
            "Can I change my contract to the smaller plan from {day}?",
        ),
    ),
    "Praise": (
        (
            "Your staff were so kind on {day}, thank you!",
            "I love the new {item}; well done.",
            "I just wanted to say that the {item} is wonderful.",
            "Great service, I will tell all my friends.",
            "Thanks to your team for the quick help on {day}.",
            "The {item} made my mother very happy.",
            "Five stars for the friendly people in your shop.",
            "What a lovely {item}, I am delighted with it.",
        ),
        (
            "Thank you so much for the lovely {item}!",
            "Your team was very friendly on {day}, great service.",
            "I am delighted: the {item} is simply wonderful.",
        ),
    ),
}
# Each as (training, held out).
ITEMS = (
    (
        *("kettle", "toaster", "desk fan", "radio", "backpack", "camera", "blender", "heater"),
        *("headset", "printer", "tent", "coffee machine", "vacuum cleaner", "keyboard"),
    ),
    ("dishwasher", "speaker", "electric bike", "hair dryer", "juicer", "monitor", "tablet"),
)
DAYS = (("Monday", "Tuesday", "Thursday", "Saturday"), ("Wednesday", "Friday", "Sunday"))
OPENINGS = (
    ("", "Hello. ", "Hi there, ", "Dear team, ", "Good morning. ", "Quick question: ", "Hey, "),
    ("", "Good evening. ", "To whom it may concern: ", "Hi all, ", "One more thing. "),
)

LABELS = tuple(TEAMS)
