"""Rude English words and phrases, for counting where no classifier can be had. The words offend; that is what they are for.

Collected for this project, not taken from a published list. Names of groups of people are left out on purpose, since they are
no insults by themselves; of the words that are nothing but slurs only the most common ones stand here. The mild list also has
the rude words of the synthetic world (``datamodules/synthetic_phrases.py``), which are mild enough to be missed otherwise.

A ``*`` at the end stands for any ending: ``idiot*`` is idiot, idiots and idiotic.
"""

STRONG = """
fuck* motherfuck* mothafuck* muthafuck* unfuck* clusterfuck* mindfuck* fuk fukin* fuking fukn fck* fcuk* phuck* fuq
stfu gtfo mofo kys shit shits shitty shittier shittiest shitter shitting shithead* shithole* shitface* shitbag*
shitshow* shitload* shitstorm* shitless shite shitpost* bullshit* horseshit dipshit* apeshit batshit chickenshit
bullshitt* shat bitch* biatch* biotch sonofabitch* son_of_a_bitch sons_of_bitches asshole* arsehole* asshat* asswipe*
assclown* asskiss* dumbass* jackass* fatass* smartass* lardass* lameass ass asses arse arses asslick* cunt* twat*
wank* tosser* bellend* knobhead* dickhead* dickface* dickwad* dick dicks cock cocks cocksuck* prick pricks bollocks
pussy pussies pussi cum cumming cumshot* jizz* jerkoff* jerk_off jack_off circlejerk* blowjob* blow_job* handjob*
dildo* boner* cumslut* tits titties titty boobs boobies clit* gangbang* fellatio cunnilingus rimjob* butthole* nutsack
ballsack whore* slut* skank* manwhore* attention_whore bastard* douche* scumbag* dirtbag* sleazebag* turd* piss pissed
pissing pisses piss_off pissant* nigger* nigga* niglet* faggot* fag fags faggy kike* spic spics chink chinks gook
gooks wetback* raghead* towelhead* tranny trannies dyke dykes retard* libtard* fucktard* tard tards kill_you kill_him
kill_her kill_them kill_your_self kill_urself kill_your kill_all kill_every_last kill_these murder_your strangle_you
stab_you shoot_you shoot_him shoot_them shoot_her beat_you_up beat_you_to beat_your beat_the_hell slit_your
cut_your_throat burn_in_hell rot_in_hell go_to_hell see_you_in_hell hunt_you_down break_your_neck break_your_legs
smash_your punch_you slap_you hang_yourself hope_you_die hope_he_dies hope_she_dies hope_they_die wish_you_were_dead
you_should_die should_be_shot should_be_hanged deserve_to_die deserves_to_die need_to_die needs_to_die drop_dead
die_in_a_fire go_die will_die_soon end_your_life be_exterminated piece_of_shit pieces_of_shit piece_of_crap
piece_of_trash piece_of_garbage piece_of_filth eat_shit suck_my* suck_it kiss_my_ass up_your_ass up_yours screw_you
screw_off bite_me shut_the_hell what_the_hell who_the_hell waste_of_space waste_of_oxygen waste_of_air waste_of_skin
scum_of_the_earth subhuman* untermensch* goatfuck* screw_them screw_him kill_yourself murder_you
"""
"""Profanity, slurs, threats and sexual insults: one is enough to call a text rude."""

MILD = """
idiot* moron* imbecile* dumb dumber dumbest dummy dummies stupid stupider stupidest stupidly stupidity dimwit*
halfwit* nitwit* twit twits numbskull* bonehead* blockhead* knucklehead* airhead* meathead* pinhead* dunce* dolt dolts
dullard* simpleton* buffoon* clown clowns fool fools foolish foolishly ignoramus* braindead brainless brain_dead
brainwashed mindless witless clueless ignorant ignorance loser losers pathetic worthless useless good_for_nothing
lowlife* low_life* scum scummy trash trashy garbage filth filthy vile disgusting disgust disgusts disgraceful disgrace
repulsive revolting nasty gross despicable wretched contemptible degenerate* deplorable* creep creeps creepy pervert*
perv pervs pervy perverted freak freaks weirdo* wacko* nutjob* nutcase* nut_job nutter* lunatic* crazy insane psycho
psychos psychopath* sociopath* maniac* deranged demented senile delusional unhinged looney looneys loony moonbat*
crackpot* coward cowards cowardly spineless gutless wimp wimps wimpy sissy sissies crybaby crybabies snowflake* whiny
whiner* bootlick* sheeple liar liars lying_sack hypocrite* hypocritical crook crooks crooked thug thugs goon goons
savage savages barbarian* parasite* leech* maggot* cockroach* swine pig pigs hag hags fatso fatty fatties lardo slob
slobs ugly hideous smelly stinking stinks stink stench slimy slimeball* sleazy sleaze sleazeball* weasel* cretin* brat
brats jerk jerks git gits sod sods bugger* minger* chav* slag slags tart hussy bimbo* floozy tramp tramps gold_digger*
old_hag crap crappy crapped crapload damn damned dammit damnit goddamn* goddam dang hell bloody freaking frickin*
friggin* effing butt butts buttocks butthead* butthurt fart* poop pooping screwed screw_up sucks suck sucked sucker*
sucking lame suckers hate hates hated hating hatred loathe* despise* detest* sicken* sickening evil wicked monster*
scam scammer* fraud frauds shut_up shut_it go_away get_lost get_a_life get_over_yourself get_out_of_my stop_bothering
bothering shame_on_you hell_with_you who_asked nobody_asked nobody_likes_you no_one_likes_you nobody_cares you_people
how_dare_you you_suck you_stink make_me_sick makes_me_sick sick_of_you wasting_my wasting nonsense rubbish laughable
ridiculous absurd so_dumb racist* racism bigot* bigoted bigotry nazi nazis fascist* fascism commie* sexist* misogyn*
xenophob* homophob* supremacist* terrorist* genocid* kill killed killing kills killer* murder* slaughter* massacre*
torture* torturing behead* lynch* strangl* stab stabbed stabbing bomb bombed bombing threaten* violence violent
assault* abuse abused abuser* abusive sex sexy sexual* naked nude nudity breast* nipple* lust* kinky fetish* bondage
strip_club stripper* seduc* groping groped grope wtf ffs badass kickass penis vagina anal anus porn* horny nudes
masturbat* orgasm* erection* ejaculat* threesome* orgy testicle* scrotum hooker* prostitut* spastic* rape raped rapes
raping rapist* molest* pedo pedos pedophil* paedophil* vermin
"""
"""Insults, coarse and violent words that also have honest uses: it takes two."""
