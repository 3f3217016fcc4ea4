"""English documents about one person each, as templates; invented for Veiltune.

``{name}``, ``{email}``, ``{phone}``, ``{home}`` and ``{work}`` are personal data, other braces are filled from
the lists of fillers.py, and ``[a|b]`` is a choice of wordings. No template names any other person.
"""

from __future__ import annotations

EMAILS = (
    "Subject: new contact details\n[Hello|Good morning|Dear team],\n[please note|I am writing to say] that my "
    "contact details have changed [this week|since {day}]. The best address to reach me is now {email}, and my new "
    "phone number is {phone}. Please [update|correct] the records for reference {ref} and delete whatever was there "
    "before. [I would be grateful for a short confirmation|One line in reply is enough], so that I do not miss the "
    "message about {event}.\n[Kind regards|Best wishes|Many thanks],\n{name}",
    "Subject: {event}\nDear all,\n[{name} has kindly agreed|we are glad that {name} agreed] to organise {event} this "
    "year. If you would like to [take part|help], please [write to|send a note to] {email} before {date}, and say "
    "how many people you will bring. Rooms are limited to {many} guests, so [an early answer helps|please do not "
    "wait too long]. Parcels and decorations can be delivered to {work}, where somebody is at the desk until {time}. "
    "[Thank you for your support|We look forward to seeing you].",
    "Subject: invoice {ref}\nTo the accounts department,\nthe invoice for {product} dated {date} shows {amount}, "
    "which is [more than|not] what was agreed. It should be made out to {name}, {home}, and not to the company. "
    "[Please send a corrected copy|A corrected copy can be sent] to {email} [before the end of the month|by {day}]. "
    "I have [already paid|held back] the part that is not in dispute and kept the receipt. If something is unclear "
    "you will find the whole correspondence under the number above.",
    "Subject: moving out, {ref}\nGood [morning|afternoon],\n[this is to confirm|as discussed on the phone,] that the "
    "removal is booked for {date} at {time}. The van will stop at {home}, second entrance, and needs about {count} "
    "metres of free space. {name} will be there with the keys and can be reached at {phone} during the whole day. "
    "[Please bring blankets for {product}|Please be careful with {product}], it has been in the family for a long "
    "time. The balance of {amount} is due [afterwards|on the same day].",
    "Subject: your application {ref}\nDear {name},\nthank you for [your interest in|applying to join] our "
    "{department} team. We [would like to invite you|are pleased to invite you] to a conversation on {day}, {date}, "
    "at {time}. It will take about {many} minutes and there is nothing to prepare. We will ring you at {phone} if "
    "the time has to change, and send the directions to {email} [a day earlier|on the evening before]. Travel costs "
    "of up to {amount} are refunded. Please bring [a photo|a short list of questions].",
    "Subject: forwarding of mail\nHello,\nuntil {date} [I am working|I will be working] from another office of the "
    "company. Letters for {name} should therefore go to {work}, marked with the reference {ref}. Private parcels "
    "still belong to {home}, [where a neighbour takes them in|where the landlord keeps them]. [Nothing changes "
    "for|Please keep using] the electronic newsletter. I am sorry for the [trouble|extra work], and I will let you "
    "know as soon as the {department} team is back on its old floor. With thanks in advance.",
    "Subject: lost property\nDear guest service,\non {day} I left {product} in the [waiting room|reading "
    "room|cloakroom], probably at about {time}. It is {colour} and has a small scratch near the handle. If it has "
    "been handed in, please [call|ring] {phone} or write to {email}. I can collect it [any evening|at the weekend], "
    "or you can send it to {home} and I will of course pay the postage, up to {price}. The ticket number of my visit "
    "was {ref}. Yours sincerely, {name}",
    "Subject: reference for a colleague\nTo whom it may concern,\n{name} has worked with our {department} team for "
    "{duration} and [was responsible for|took care of] {event}. [The work was always done on time|We could rely on "
    "every promise], also in a year when half of the staff was away. We are sorry about the decision to leave and "
    "wish all the best. Questions can be put to the office at {work}. The former colleague has asked us to [pass "
    "on|mention] the private number {phone} for offers.",
    "Subject: {course}\nDear participants,\nthe seats for {course} on {date} have been [given out|assigned]. {name} "
    "is on the list and keeps the place that was reserved under {ref}. The course begins at {time} in {work}, please "
    "use the entrance in the yard. The material is sent [in advance|two days before] to {email}. [Lunch is "
    "included|Coffee is free], but please bring your own cup. If you cannot come, tell us by {day}, since there are "
    "{many} people on the waiting list.",
    "Subject: [reminder|second reminder], {ref}\nDear {name},\nour records show that {product}, [lent|given] to you "
    "on {date}, has not come back yet. Please return it by {day} or [renew the loan|ask for more time] in writing. A "
    "fee of {price} is added for every further week. Since our letter to {home} was not answered, this message goes "
    "to {email} as well, and a copy stays with the {department} desk. If you have returned it in the meantime, "
    "please [ignore this note|accept our apologies].",
)
TICKETS = (
    "Ticket {ref}, opened {date} at {time}. Customer {name} reports that {product} [stopped working|makes a loud "
    "noise] after {duration} of normal use. Restarting it did not help, and the light stays {colour}. The customer "
    "asks for [a call|an answer] before {day}, number {phone}. A replacement should be sent to {home} because nobody "
    "is at the office in the next two weeks. Priority: [normal|high]. Next step: {department} checks the warranty "
    "and [confirms the exchange|offers a repair] for at most {amount}.",
    "Ticket {ref}. Problem: [password reset fails|sign-in code never arrives]. The account belongs to {name} and is "
    "registered under {email}. The message about the reset was sent {count} times since {day} and bounced each time "
    "with the same error. We [confirmed the identity|checked the identity] by calling {phone} at {time}. Cause found "
    "on {date}: the mailbox was on an old block list. The entry has been removed, [the customer was told to try "
    "again|a new code has been sent]. The ticket stays open until {department} agrees.",
    "Ticket {ref}, category access. {name} needs a new door card for {work} because the old one was [bent|lost|left "
    "in a taxi] on {day}. The old card was blocked at {time}. A deposit of {price} applies. The new one will be "
    "printed by {department} and can be fetched from the front desk after {date}. Until then a visitor card is "
    "[enough|valid]. The answer and the form go to {email}. Note: [the photo on file is too old|the same card was "
    "replaced last year].",
    "Ticket {ref}: [order not received|parcel missing]. Order of {product}, {amount}, placed on {date}. According to "
    "the carrier it was delivered at {time} on {day}, but {name} says that nothing arrived at {home}. [Neighbours "
    "were asked|The neighbours know nothing]. A search was started and takes about {count} working days. Until then "
    "please do not [refund|send a second parcel]. Updates by message to {email}, the customer does not want to be "
    "called. Owner of the ticket: {department}.",
    "Ticket {ref}, [complaint|formal complaint]. {name} writes that the technician who was announced for {day} at "
    "{time} did not come. A whole afternoon was spent waiting at {home}, without any message. We have "
    "[apologised|said sorry] and offered {amount} as compensation. A new visit is planned for {date}, the technician "
    "must ring {phone} half an hour before arrival. Please bring a spare part for {product}, the {colour} one. If "
    "this fails again, {department} has to [step in|decide].",
    "Ticket {ref}, change of data. Requested by {name}, [verified|checked] with the last invoice. New delivery "
    "address: {home}. New office address: {work}. Both are valid from {date} on. [The old ones are to be "
    "deleted|Please delete the old ones], also in the backup list of {department}. One order, {product}, is already "
    "on its way and cannot be redirected any more; the customer [will ask the former landlord|accepts that]. Closed "
    "at {time} after {many} minutes. No follow-up needed.",
    "Ticket {ref}. Since the update on {date} the calendar of {name} shows every meeting {count} hours late. Phone "
    "and laptop agree with each other, so [the server|the account] must be wrong. The time zone was set again at "
    "{time} on {day}, without success. The user sits at {work}, third floor, and [prefers a visit|would like a "
    "visit] to a remote session. Short questions may also be put by phone, {phone}. Also affected: {product}. "
    "Assigned to {department}, expected effort {count} hours.",
    "Ticket {ref}, [unsubscribe|privacy request]. {name} [asks|demands] to be removed from every mailing list, named "
    "are {email} and the postal address {home}. The request arrived on {date} and has to be answered within "
    "{duration}. The {department} team found {count} lists, two of them from an old campaign about {product}. All "
    "entries were deleted on {day} at {time}, and the [deletion|result] was written down in the register. The "
    "confirmation goes out by post. Costs: none.",
    "Ticket {ref}, installation. {product_cap} for the meeting room at {work}. Contact on site is {name}, phone "
    "{phone}, who also has the key to the [server room|store room]. [Cables are in place|The cables were laid] since "
    "{date}. Please arrive on {day} not later than {time}, the room is booked afterwards for {event}. Bring the long "
    "ladder and {count} brackets. The budget of {amount} must not be exceeded without [a signature|permission] from "
    "{department}.",
    "Ticket {ref}, feedback. {name} [praises|thanks] the {department} team for the quick help with {product} on "
    "{day}. It was [repaired|running again] in less than {count} days, although the shop had said six weeks. As a "
    "thank-you the customer sent a box of biscuits to {work}. We would like to [quote this|use this on our page]; "
    "{department} asks for permission by message to {email}. A voucher over {amount} is attached to the customer "
    "account. Closed on {date} at {time}.",
)
CHATS = (
    "Agent: [Hello|Good morning|Welcome], how can I help?\nCustomer: I am {name} and I still wait for {product}.\n"
    "Agent: [Let me look|One moment, please]. The order {ref} left our store on {date}. Is {home} the right "
    "address?\nCustomer: Yes, [since last month|that is right].\nAgent: Thank you. It should arrive on {day} around "
    "{time}. May we ring {phone} if nobody opens?\nCustomer: [Of course|Sure], but not before noon.\nAgent: Noted. "
    "Have a nice day!",
    "Agent: You are talking to the {department} desk.\nCustomer: The refund of {amount} has not [arrived|come].\n"
    "Agent: I am sorry. [Under which name|In whose name] was the booking?\nCustomer: {name}, reference {ref}.\n"
    "Agent: I see it. The payment was stopped on {date} because the account number was wrong. I can send a form to "
    "{email}. Is that still [correct|your address]?\nCustomer: It is. Please be quick, I leave on {day}.\nAgent: You "
    "will have it by {time}, and the money after {duration}.",
    "Visitor: Can I change the [place|address] of my delivery?\nAgent: If it has not left, yes. What is the number?\n"
    "Visitor: {ref}, for {name}.\nAgent: Found, {product}, planned for {day}. Where should it go?\nVisitor: Please "
    "send it to {work}, I am there until {time}. At home nobody would [hear the bell|open].\nAgent: [Done|All "
    "right], that costs {price} more. A new slip goes to {email}.\nVisitor: Perfect, [thanks a lot|thank you for the "
    "quick help].",
    "[Colleague|Team lead]: Does anybody know how to reach {name}? The {department} meeting was moved to {time}.\n"
    "[Assistant|Front desk]: On the road until {day}, but the phone is on: {phone}.\nColleague: No answer, I tried "
    "{count} times.\nAssistant: Then write to {email}, that is read [every evening|in the train].\nColleague: Done. "
    "And the papers for {event}?\nAssistant: They lie in the {colour} folder, reference {ref}. [I can scan them|Take "
    "them with you].\nColleague: Great, that saves me {duration}.",
    "Bot: Please describe [your problem|what happened].\nUser: {product_cap} is broken, I bought it on {date}.\nBot: "
    "I am sorry to hear that. To start a return I need your full name.\nUser: {name}\nBot: Thank you. Where shall "
    "the courier collect it?\nUser: {home}, on {day} after {time} please.\nBot: And an [e-mail|e-mail address] for "
    "the label?\nUser: {email}\nBot: [All set|Everything is ready]. Your return number is {ref}, and you will get "
    "{amount} back within {duration}.",
    "Agent: [Insurance hotline|Claims desk], good afternoon.\nCaller: There was water damage at {home} last {day}.\n"
    "Agent: I hope nobody was hurt. Whose policy is it?\nCaller: {name}, policy {ref}. [{product_cap} is ruined|The "
    "floor is wet and {product} is ruined].\nAgent: An expert will come by {date}. We need a number for the "
    "appointment.\nCaller: Take {phone}, and during office hours you find me at {work}.\nAgent: Thank you. [Please "
    "take photos|Do not throw anything away], up to {amount} is paid at once.",
    "Moderator: The winner of {event} is [known|drawn]: congratulations, {name}!\nMember: [Wonderful|How nice], what "
    "is the prize?\nModerator: It is {product}, worth {amount}. We only need to agree on the delivery.\nMember: The "
    "best place is {work}, there is a porter until {time}.\nModerator: Fine. The form was sent to {email} under "
    "{ref}, please answer before {date}.\nMember: [I saw it|It has just arrived]. It was worth waiting {duration} "
    "for this!",
    "Driver: I stand in front of {home} and the gate is [closed|locked].\nDispatcher: One moment. The order {ref} is "
    "for {name}, {product}, paid. There is a note: ring twice and use the {colour} door.\nDriver: Nobody opens, I am "
    "here since {time}.\nDispatcher: Then call {phone} and wait for {count} more minutes.\nDriver: Somebody is "
    "[coming|waving] now. [It was the wrong side of the house|The bell does not work].\nDispatcher: Good. Please "
    "have it signed, the next stop is due on {day}.",
    "Student: Is {course} already full?\nOffice: {count} seats are left, it begins on {date}.\nStudent: Then please "
    "put me down, my name is {name}.\nOffice: [With pleasure|Gladly]. We need an address for the "
    "[certificate|papers].\nStudent: {home}\nOffice: And a phone number, in case that the room changes?\nStudent: "
    "{phone}, mornings are best. My employer pays, please send the invoice over {amount} to {work}.\nOffice: All "
    "done, your number is {ref}. [See you on {day}|Welcome to the course].",
    "Nurse: The laboratory found the results from {date}.\nDesk: [At last|Good news]. Whose are they?\nNurse: "
    "{name}, file {ref}. They had been in the {colour} tray for {duration}.\nDesk: Shall I post them to {home}?\n"
    "Nurse: Better write to {email} first, the patient [wanted|asked] to decide. There is also an office address, "
    "{work}, but nothing private should go there.\nDesk: [Understood|I see]. I will do it before {time}.\nNurse: "
    "Thank you, and close the file on {day}.",
)
HR_NOTES = (
    "Personnel note, {date}. {name} joins the {department} team on {day} for a probation of {duration}. [Desk and "
    "laptop are ready|A desk and a laptop are waiting] at {work}, and the pass was ordered under {ref}. Until the "
    "company mailbox is set up, messages go to {email}. The first week is spent with [an experienced colleague|a "
    "mentor], and the safety lesson takes place at {time}. Please welcome the new member with {product}, for which "
    "{amount} has been put aside.",
    "Personnel file {ref}, emergency sheet. Employee: {name}. Home address: {home}. Phone at night: {phone}. [No "
    "known allergies|Allergic to nuts]. Blood group unknown. The sheet was [renewed|checked] on {date} and is kept "
    "in the {colour} cabinet of {department}. It may be opened by first aiders only. In case of fire the meeting "
    "point for the floor is the yard, and the list is [called out|read out] by the warden. The next check is in "
    "{duration}, on a {day}.",
    "Minutes of the [yearly|half-yearly] talk with {name}, held on {date} at {time} in {work}. Goals reached: "
    "{event} and the new plan for {department}. [Wishes|Requests]: {course}, and {count} days of work from home each "
    "month. For that purpose the home office at {home} was described and found suitable. The pay rises by {amount} "
    "from next quarter. Both sides [were content|agreed]. Signed copies are filed under {ref}, and the next talk "
    "follows in {duration}.",
    "Leave request {ref}: {name}, {department}, absent from {date} for {duration}. Reason: [family matters|a long "
    "journey|further training]. A colleague takes over {event}, the keys are in the {colour} drawer. In urgent "
    "cases, and only then, {phone} may be called between nine and {time}. Papers that have to be signed can be "
    "brought to {home} by courier. The request was [granted|approved] on {day}. Remaining leave: {count} days, to be "
    "used before spring.",
    "Payroll, correction {ref}. The salary of {name} for last month was [too low|too high] by {amount} because "
    "{count} extra hours for {event} were [left out|counted twice]. The difference is settled on {date}. A new slip "
    "has been sent to {email}, and the paper copy goes to {home}. The {department} team was informed on {day} at "
    "{time}. Please make sure that the bonus for {course} is not [forgotten|touched]. No tax effect is expected in "
    "this year.",
    "[Farewell|Exit] checklist for {name}, {department}, last day {date}. Returned so far: {product}, the pass and "
    "the {colour} folder. Still missing: parking card, {count} books. The account closes at {time}. The mailbox "
    "answers for {duration} with the private address {email}. The certificate [will be posted|goes] to {home}, and "
    "questions about the pension can be asked later too. A small party is planned on {day}, for which {amount} was "
    "[collected|spent]. File: {ref}.",
    "Note on [home equipment|remote work], {ref}. {name} received {product} and a chair for the second workplace at "
    "{home}, total value {amount}. The main workplace remains {work}, where at least {count} days a month are spent. "
    "The line was tested on {day} at {time} by {department} and is [fast enough|good]. For help with the connection "
    "the colleague is called on {phone}. Everything must come back when the contract ends. The agreement [runs "
    "until|is valid to] {date}.",
    "Travel order {ref}. {name} travels for {department} to {event} on {date} and is away for {duration}. The train "
    "leaves at {time}, [a seat is reserved|the seat has a table]. Advance payment: {amount}. The tickets were sent "
    "to {email}. On the way and at night the traveller can be reached at {phone}. {product_cap} must be "
    "[insured|carried by hand]. The report is due on {day} of the following week, with all {count} receipts, [sorted "
    "by date|in one envelope].",
    "Accident report {ref}. On {date} at {time} {name} slipped on the stairs of {work} while carrying {product}. "
    "[The wrist hurt|The left knee was swollen], a first aider cooled it for {many} minutes. A doctor was seen on "
    "the same day, [nothing is broken|no operation is needed], and work can start again after {duration}. The "
    "handrail was loose, {department} had it repaired by {day}. The insurance will call {phone} for details. Damage "
    "to things: {amount}.",
    "Training record. {name} of {department} passed {course} on {date} with {many} points [out of fifty|of fifty]. "
    "The certificate has the number {ref} and stays valid for {duration}. It hangs at the workplace, {work}, as the "
    "rules [ask for|demand]. A copy was mailed to {email}. The costs of {amount} are shared with the employee, who "
    "[agreed to stay|agreed] for at least a year. The next refresher is offered on a {day} at {time}, and the seat "
    "is already booked.",
)
SHIPPING = (
    "Delivery note {ref}. Recipient: {name}, {home}. Contents: {product}, {colour}, one piece. [Fragile, keep "
    "upright|Handle with care]. The parcel weighs {count} kilograms and is insured for {amount}. Planned for {day}, "
    "{date}, before {time}. If the recipient is out, call {phone} and leave it with [the neighbour on the left|the "
    "shop next door], never in front of the house. A signature is needed. Packed and checked by {department}. "
    "Complaints have to be made within {duration}, with [a photo|photos] of the box.",
    "Pickup order {ref}: collect {product} at {work}, ground floor, on {day} from {time} on. Ask for {name}, who has "
    "[packed everything|the papers]. The goods are [already sold|on loan] and go to a warehouse for {duration}. "
    "Payment of {amount} was received on {date}. The proof of collection is sent to {email}. The driver needs "
    "{count} straps and the {colour} form. [Parking is allowed in the yard|There is a ramp behind the building]. "
    "Questions are answered by {department}.",
    "[Dear customer|Good news], your order {ref} is on its way. {product_cap} left our warehouse on {date} and will "
    "reach you on {day} between nine and {time}. We deliver to {name}, {home}. To change the day, use the link that "
    "was sent to {email} [within {many} hours|today]. Please check the box before you sign. If something is broken, "
    "refuse it, and we refund {amount} [at once|after {duration}]. Your {department} team says thank you and wishes "
    "you a pleasant week.",
    "Customs declaration {ref}. Sender: {name}, {work}, phone {phone}. Contents: {product}, used, {colour}, for [own "
    "use|an exhibition]. Value for customs: {amount}. Date of posting: {date}. The goods [will be returned|come "
    "back] after {duration}. If they cannot be delivered, they shall be sent back at the cost of the sender. The "
    "sender confirms that the parcel holds nothing dangerous, no liquids and no food. Checked on {day} at {time} by "
    "{department}, {count} pages attached.",
    "[Failed delivery|Delivery attempt], {ref}. On {day} at {time} nobody opened at {home}. The parcel for {name}, "
    "{product}, is kept for {duration} in the shop at the corner. After {date} it [goes back|is returned] to the "
    "sender. For a second attempt, costing {price}, answer the message that we sent to {email} or tell us a time by "
    "phone; nobody answered at {phone}. [Bring this note and a card with a photo|An identity card is needed] for "
    "collection.",
    "Loading list for {day}, {date}, van {count}. First stop at {time}: {work}, deliver {product} to {name}, second "
    "floor, [use the goods lift|the lift is narrow]. The customer [wants|asked for] a call at {phone} when the van "
    "leaves the depot. Collect the old one, {colour}, and write down the number {ref}. Cash on delivery: {amount}. "
    "After that continue to the market hall. The tour should take not more than {count} hours. Signed for "
    "{department}, [keys returned|tank full].",
    "Storage contract {ref}. {name}, living at {home}, [rents|takes] a box of {count} square metres from {date} for "
    "{duration}. The rent of {amount} is due on the first {day} of each month. Stored: {product}, books and winter "
    "tyres. The invoice is sent to {email}, reminders are [made by phone|given by phone], {phone}. The box may be "
    "opened until {time} every day. Food, fuel and animals are forbidden. Our {department} team has a second key for "
    "[emergencies|a fire].",
    "Return slip {ref}. From: {name}, {home}. Item: {product}, {colour}. Reason: [too small|not as described|ordered "
    "twice]. Date of purchase: {date}. Please refund {amount} to the card that was used. The office of the customer "
    "is [open for collection too|another place for collection]: {work}, until {time}. The box is [new|the original "
    "one] and contains {count} parts. Our {department} team needs {duration} for the check, counted from the {day} "
    "on which it arrives.",
    "Freight notice. Shipment {ref} with {product} for {name} reached the terminal on {date}. It has to be taken "
    "over at {work} on {day}, at {time} at the latest, [otherwise storage is charged|else a fee is charged], {price} "
    "for each day. The bill of lading was [mailed|sent] to {email}. Please have a fork lift and {count} helpers "
    "ready. The crate with the {colour} mark is opened first. Damage must be reported to {department} within "
    "{duration}, in writing and with [a picture|two pictures].",
    "Subscription {ref}: from {date} on {name} receives a box of vegetables every {day}. It is left before {time} "
    "behind the [{colour} gate|{colour} bench] at {home}. During holidays it goes to {work} instead, where "
    "colleagues [share it|cook together]. Price: {amount} for {duration}, to be paid in advance. Please return the "
    "empty crate, the deposit for {count} crates is included. Changes are accepted by phone: if a delivery is missed "
    "we call {phone}. [Enjoy your meal|Have a good season]!",
)
MEDICAL = (
    "Intake form {ref}, {date}. Patient: {name}. Address: {home}. Phone: {phone}. Complaint: {symptom} for "
    "{duration}, [worse at night|worse in the morning]. No fever. Takes {count} tablets a day against high blood "
    "pressure. Smoker: [no|formerly]. The patient waits in room {count} and is seen at {time}. Blood was taken and "
    "sent to the laboratory. Next visit on {day}. The fee of {amount} is settled with the insurance. The form was "
    "filled in by the front desk and [read back|checked].",
    "Referral. {name} is sent to the [heart|eye|skin] clinic because of {symptom}, which began about {duration} ago. "
    "The examination of {date} showed nothing alarming, yet [a second opinion is wanted|we would like to be sure]. "
    "Please offer an appointment before {day}, preferably after {time}, and tell the patient by message to {email}. "
    "Earlier pictures are on a disc with the number {ref}. The employer, at {work}, needs a note for the "
    "[missed|lost] hours. Allergy: [penicillin|none known].",
    "Discharge letter {ref}. {name}, resident at {home}, was with us from {date} for {duration} because of "
    "{symptom}. The course was [without problems|as hoped]. Walking is possible again, [first with a stick|up to "
    "{many} steps], and should be practised daily. Progress is checked on {day} at {time}. The nurse who visits at "
    "home arranges the hours through {email}. Tablets are taken for {count} more days. Please do not [drive|lift "
    "heavy things] until the next check.",
    "Vaccination reminder. [Dear|Good day] {name}, your last injection was on {date}, so the next one is due in "
    "{duration}. We have free hours on {day} until {time}. [Call us back|Please tell us] whether we may ring you at "
    "{phone} to agree on one. The record {ref} shows {count} entries. Those who work with others may be served at "
    "the workplace: our bus stops at {work} [once a month|next month]. The costs of {amount} are covered. Please "
    "wear a shirt with [wide|short] sleeves.",
    "Prescription {ref}, issued on {date}. For {name}, {home}. One tablet in the morning, {many} drops at night, for "
    "{duration}, against {symptom}. [Do not take it with milk|Take it after a meal]. It can be collected at the "
    "pharmacy from {time} on, or brought to the office of the patient, {work}, on {day}. Own share: {price}. The "
    "pharmacist [explained|mentioned] the side effects, such as a dry mouth. If the complaint lasts, the doctor "
    "should be seen again before the box is empty.",
    "Note of the night nurse, {date}. {name} [slept badly|slept well] and asked for water at {time}. {symptom_cap} "
    "is [less strong|unchanged] since {day}. The family should be told in the morning, they share the number "
    "{phone}. A bag with [clothes|books and clothes] was handed over and stands beside the bed. Blood pressure was "
    "measured {count} times and is fine. After the stay, in about {duration}, care goes on at {home}, stairs without "
    "a rail. File {ref}, the {colour} one.",
    "Dental plan {ref}. {name} needs a [crown|filling] on the lower left side and complains of [toothache|a sore "
    "gum] since the visit of {date}. Estimated cost: {amount}, of which the insurance pays [half|a third]. First "
    "appointment: {day}, {time}, about {many} minutes. The plan was sent to {email} for signature, the pictures "
    "follow. If the date does not suit, our assistant rings {phone} [in the evening|after work]. The treatment takes "
    "{duration} in all. Please do not eat two hours before.",
    "Physiotherapy, [report|summary] {ref}. {name} came {count} times since {date} because of {symptom}. The back is "
    "more mobile, [sitting for long is still hard|lifting still hurts]. We recommend {duration} of exercises and a "
    "higher desk at the workplace, {work}; the employer has agreed to {product}. A sheet with pictures was mailed to "
    "{email}. Two sessions can be [held|given] at {home} if the weather is bad. The last hour is on {day} at {time}, "
    "own share {price}.",
    "Blood donation, {date}. Thank you, {name}! Your donation has the number {ref} and was [used|needed] on the very "
    "next {day}. You may come again after {duration}. We will [write|send a card] to {home}, and remind you by "
    "phone, {phone}, if your group is rare. Please drink {count} glasses of water on the day itself and avoid sport "
    "until {time}. Donors receive [a towel|a cup], and a free check for {symptom} or [tiredness|low iron]. The "
    "{department} team says thank you.",
    "Study log {ref}. Participant {name} agreed on {date} to [take part|join] for {duration}. Payment: {amount} "
    "after the last visit. The diary about {symptom} is filled in every {day} and sent from {email}. A nurse visits "
    "{home} {count} times, [always|mostly] before {time}, and during working hours {work}. In an emergency the "
    "participant calls the hotline; we would call back at {phone}. The data are stored under the number only, [names "
    "are kept apart|the key is kept elsewhere].",
)
TEMPLATES = (*EMAILS, *TICKETS, *CHATS, *HR_NOTES, *SHIPPING, *MEDICAL)
