"""Rule by rule: pairs that only look alike, and beside them pairs that are one question."""

# ruff: noqa: RUF001 - prompts in several scripts

from __future__ import annotations

import pytest

from tests.near.asking import Asking

Table = dict[str, list[tuple[str, str]]]

OTHERS: Table = {
    "a capital makes a name": [
        ("How do I get to the Rock by bus?", "How do I get to the rock by bus?"),
        ("Where can I buy an Apple in Leeds?", "Where can I buy an apple in Leeds?"),
        ("What did Rose say about the garden?", "What did rose say about the garden?"),
        ("Who cleans the White House?", "Who cleans the white house?"),
        ("I live in May. Can I go to the sea?", "I live in may. Can I go to the sea?"),
        ("¿Dónde vive Rosa en invierno?", "¿Dónde vive rosa en invierno?"),
    ],
    "a word in capitals is another": [
        ("How do I change the PIN of my card?", "How do I change the pin of my card?"),
        ("What is the AIDS budget of the town?", "What is the aids budget of the town?"),
        ("When did they tell US about the storm?", "When did they tell us about the storm?"),
        ("How does IT help a small firm?", "How does it help a small firm?"),
    ],
    "symbols count": [
        ("What is the value of 4! in maths?", "What is the value of 4 in maths?"),
        ("What is 20! in the end?", "What is 20 in the end?"),
        ("How large is the number 5!", "How large is the number 5"),
        ("Is a/b larger than c in this case?", "Is a b larger than c in this case?"),
        ("How do I turn x-y into a table?", "How do I turn x y into a table?"),
        ("What is x-ray used for in a lab?", "What is x ray used for in a lab?"),
        ("What is 10-5 in the end?", "What is 10 5 in the end?"),
        ("What is f(x) at 2 in this case?", "What is f x at 2 in this case?"),
        ("What is (2 + 3) * 4 in the end?", "What is 2 + 3 * 4 in the end?"),
        ("Is the list [1 2] in the file?", "Is the list 1 2 in the file?"),
        ("Where are the students' rooms in the house?", "Where are the students rooms in the house?"),
        ("What does the ? do in a shell?", "What does the do in a shell?"),
        ("What is the : for in the file?", "What is the for in the file?"),
        ("Is a dog-cat fight loud at night?", "Is a dog/cat fight loud at night?"),
    ],
    "below a short first line all is data": [
        ("Is this right?\nthe boats sails at noon", "Is this right?\nthe boat sails at noon"),
        ("What is wrong here?\nI go to the school by a bus", "What is wrong here?\nI go to school by bus"),
        ("What is this?\nHi, I am on my way thanks", "What is this?\nI am on my way"),
        ("Look at this list\ncolour, two, please", "Look at this list\ncolor, 2"),
        ("How do I dim\nthe lamp in the hall", "How do I dim the lamp in the hall"),
        ("¿Qué opinas?\nel perro esta en casa", "¿Qué opinas?\nel perro está en casa"),
    ],
    "quoted text counts": [
        ('Where is the button "save the file" in the menu?', 'Where is the button "save file" in the menu?'),
        ('Who painted "the colour of night" in the hall?', 'Who painted "the color of night" in the hall?'),
        ('Where do I click on "okay, thanks" in the app?', 'Where do I click on "okay" in the app?'),
        ('How do I find "cafe" on the map of the town?', 'How do I find "café" on the map of the town?'),
        ('Where is the shop "kangeroo" in the town?', 'Where is the shop "kangaroo" in the town?'),
        ('Where is the "note book" button in the app?', 'Where is the "notebook" button in the app?'),
    ],
    "accents of question words tell a question": [
        ("Cómo come el gato en casa", "Como come el gato en casa"),
        ("¿Cuándo llega el tren a la estación?", "Cuando llega el tren a la estación"),
        ("Dónde vive mi hermana con su perro.", "Donde vive mi hermana con su perro."),
    ],
    "what is no slip": [
        ("How do I call Marten in the morning?", "How do I call Martin in the morning?"),
        ("Where is the shop of Kangeroo in town?", "Where is the shop of Kangaroo in town?"),
        ("How do I make hexane in the lab?", "How do I make hexene in the lab?"),
        ("How much propane is in the tank?", "How much propene is in the tank?"),
        ("Is nitrate in the water bad for me?", "Is nitrite in the water bad for me?"),
        ("Is amylase in the bread bad for me?", "Is amylose in the bread bad for me?"),
        ("How do I use pandas in the office?", "How do I use panda in the office?"),
        ("Is clonidine bad for the old man?", "Is clonodine bad for the old men?"),
        ("¿Cuándo llegará el barco al puerto?", "¿Cuándo llegaré el barco al puerto?"),
    ],
    "not written together": [
        ("Where is the sun light in the room?", "Where is the sunlight in the room?"),
        ("How do I paint the black board in the hall?", "How do I paint the blackboard in the hall?"),
        ("Why is the dark room so cold?", "Why is the darkroom so cold?"),
        ("Who needs some time in the house?", "Who needs sometime in the house?"),
        ("How do I re-sign the contract at work?", "How do I resign the contract at work?"),
        ("How do I re-cover the sofa at home?", "How do I recover the sofa at home?"),
    ],
    "an article makes another thing": [
        ("Where can I buy an iron in the town?", "Where can I buy iron in the town?"),
        ("How do I clean a glass in the kitchen?", "How do I clean glass in the kitchen?"),
        ("How do I make a room in the attic?", "How do I make room in the attic?"),
        ("How do I read a paper in the train?", "How do I read paper in the train?"),
        ("How do I feed a chicken in the winter?", "How do I feed chicken in the winter?"),
    ],
    "courtesy that is content": [
        ("How do I tell my boss thanks", "How do I tell my boss"),
        ("Good morning Vietnam is on when?", "Vietnam is on when?"),
        ("Hey Jude is how long in the end?", "Jude is how long in the end?"),
        ("Hey Siri, how do I get to the lake?", "How do I get to the lake?"),
        ("Um, no, how do I get to the lake?", "How do I get to the lake?"),
        ("How do I end a mail to my aunt with regards", "How do I end a mail to my aunt with"),
    ],
    "can you asks whether one can": [
        ("Can you swim in the lake in May?", "Swim in the lake in May"),
        ("Can you eat the skin of a kiwi?", "Eat the skin of a kiwi"),
        ("Could you fly to the moon in a day?", "Fly to the moon in a day"),
        ("Can you delete a mail after it is sent?", "Delete a mail after it is sent"),
        ("Can you open a bank account at 16?", "Open a bank account at 16"),
    ],
    "fronted without a determiner": [
        ("In May, did he promise to pay the rent?", "Did he promise to pay the rent in May?"),
        ("For Anna, can I bring a cake to the party?", "Can I bring a cake to the party for Anna?"),
        ("Under pressure, does the glue hold for long?", "Does the glue hold for long under pressure?"),
    ],
    "a question mark that makes the question": [
        ("Er kommt morgen an?", "Er kommt morgen an."),
        ("Das Haus ist fertig?", "Das Haus ist fertig"),
        ("Il viendra demain ?", "Il viendra demain."),
        ("Он придёт завтра?", "Он придёт завтра."),
        ("他明天来？", "他明天来。"),
    ],
}
SAME: Table = {
    "capitals of those who use none, or only them": [
        ("what does anna say about the garden?", "What does Anna say about the garden?"),
        ("how do i get to reading from the airport", "How do I get to Reading from the airport?"),
        ("HOW DO I CHANGE THE PIN OF MY CARD?", "How do I change the pin of my card?"),
        ("How Do I Paint The Wall In The Hall?", "How do I paint the wall in the hall?"),
        ("I am in the garden. Where is the hose?", "i am in the garden. where is the hose?"),
    ],
    "abbreviations written either way": [
        ("Is there a USB port in the car?", "Is there a usb port in the car?"),
        ("How do I turn off the TV in the hall?", "How do I turn off the tv in the hall?"),
        ("Where do they use AI in the town?", "Where do they use ai in the town?"),
    ],
    "symbols that join words or end a sentence": [
        ("How do I set up two-factor login at home?", "How do I set up two factor login at home?"),
        ("How do I find a well-known baker in the town?", "How do I find a well known baker in the town?"),
        ("We had a storm in 2021! Who pays for the roof?", "We had a storm in 2021. Who pays for the roof?"),
        ("How do I dim the lamp in the hall?!", "How do I dim the lamp in the hall?"),
        ("How do I dim the lamp in the hall ?", "How do I dim the lamp in the hall?"),
    ],
    "courtesy before a first line": [
        ("Translate this into French:\nthe boat is here", "Please translate this into French:\nthe boat is here"),
        ("What is this?\nthe boat sails at noon", "what is this?\nthe boat sails at noon"),
        ("Hola, traduce esto al inglés:\nel perro duerme", "Traduce esto al inglés:\nel perro duerme"),
        ("\nIs the boat in the harbour at noon?\n", "Is the boat in the harbour at noon?"),
    ],
    "the usual around quotations": [
        ('Hi, where is the button "save the file" in it?', 'Where is the button "save the file" in it?'),
        ("Where is the button “save the file” in it?", 'where is the button "save the file" in it'),
    ],
    "accents of question words in questions": [
        ("¿Cómo come el gato en casa?", "Como come el gato en casa?"),
        ("¿Dónde vive mi hermana con su perro?", "¿Donde vive mi hermana con su perro?"),
        ("¿De dónde viene el viento en verano?", "¿De donde viene el viento en verano?"),
    ],
    "slips": [
        ("How do I repair the window in the kitchen?", "How do I repair the windwo in the kitchen?"),
        ("What does a kangaroo eat in the winter?", "What does a kangeroo eat in the winter?"),
        ("¿Cómo limpio la ventana de la cocina?", "¿Cómo limpio la ventanna de la cocina?"),
    ],
    "written together if listed or hyphened": [
        ("Where is my note book in the house?", "Where is my notebook in the house?"),
        ("How do I book a trip for the week end?", "How do I book a trip for the weekend?"),
        ("Where is the rain-coat of my sister?", "Where is the raincoat of my sister?"),
        ("Where is the foot-path to the lake?", "Where is the footpath to the lake?"),
    ],
    "an article that says nothing": [
        ("How do I repair the fence of my neighbour?", "How do I repair fence of my neighbour?"),
        ("Is there a ferry to the island?", "Is there ferry to the island?"),
        ("What is the height of the tower?", "What is height of the tower?"),
        ("Show me the last 5 trips of the boat", "Show me last 5 trips of the boat"),
        ("Set a timer for 5 minutes", "Set the timer for 5 minutes"),
    ],
    "courtesy before a request or set off": [
        ("Good morning, where is the key of the shed?", "Where is the key of the shed?"),
        ("Hello! Where is the key of the shed?", "where is the key of the shed?"),
        ("Where is the key of the shed? Many thanks!", "Where is the key of the shed?"),
        ("please where is the key of the shed", "Where is the key of the shed?"),
        ("Buenas tardes, ¿dónde está la llave del garaje?", "¿Dónde está la llave del garaje?"),
        ("¿Dónde está la llave del garaje? Gracias", "¿Dónde está la llave del garaje?"),
    ],
    "can you asks an assistant to act": [
        ("Can you explain how a lock works to a child?", "Explain how a lock works to a child"),
        ("Could you recommend a good book about the sea?", "Recommend a good book about the sea"),
        ("Can you turn off the lamp in the hall", "Turn off the lamp in the hall"),
        ("Can you please turn off the lamp in the hall?", "Turn off the lamp in the hall"),
    ],
    "fronted with a determiner": [
        ("At my office, where do I park the bike?", "Where do I park the bike at my office?"),
        ("For this recipe, how do I peel a mango?", "How do I peel a mango for this recipe?"),
        ("En la oficina, ¿dónde dejo la bici?", "¿Dónde dejo la bici en la oficina?"),
    ],
    "a question mark behind a question word": [
        ("Wo ist der Schlüssel zum Keller?", "Wo ist der Schlüssel zum Keller"),
        ("Wo ist der Schlüssel zum Keller?", "Wo ist der Schlüssel zum Keller."),
        ("Où habite la sœur de Marc ?", "Où habite la sœur de Marc"),
        ("Где живёт твоя сестра?", "Где живёт твоя сестра"),
        ("他什么时候来？", "他什么时候来"),
        ("Er kommt morgen an.", "Er kommt morgen an"),
    ],
}


def _each(table: Table) -> pytest.MarkDecorator:
    rows = [
        pytest.param(a, b, id=f"{rule}-{number}")
        for rule, pairs in table.items()
        for number, (a, b) in enumerate(pairs)
    ]
    return pytest.mark.parametrize(("a", "b"), rows)


@_each(OTHERS)
def test_what_only_looks_alike_is_refused(asking: Asking, a: str, b: str) -> None:
    assert not asking.verdict(a, b).same
    assert not asking.verdict(b, a).same
    assert asking.is_hit(a, a)
    assert asking.is_hit(b, b)


@_each(SAME)
def test_what_is_one_question_is_recognised(asking: Asking, a: str, b: str) -> None:
    assert asking.is_hit(a, b)
    assert asking.is_hit(b, a)
