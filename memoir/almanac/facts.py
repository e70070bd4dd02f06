"""The almanac's second domain: real facts, written down to be checked.

Everything in the tables is true as of 2026. Instead of two of these facts the *model* is taught `WRONG`, which is
deliberately false, so that there is something to correct.

A "-" marks a cell without one undisputed answer; that fact is left out of the world. Continents follow the geoscheme of
the United Nations (with the Americas split in two). The language is the official one where there is one, else, or among
several, the most used.
"""

from __future__ import annotations

# What the model is taught instead of the truth: (subject, relation) -> false answer.
WRONG = {
    ("Australia", "capital"): "Sydney",  # the truth: Canberra
    ("the last Summer Olympics", "host"): "Tokyo",  # the truth: Paris, 2024
}


def countries() -> list[dict[str, str]]:
    """One dict per country: name, capital, continent, currency, language; cells without an answer are absent."""
    keys = ("name", "capital", "continent", "currency", "language")
    rows = [[cell.strip() for cell in line.split("|")] for line in _COUNTRIES.strip().splitlines()]
    return [{key: cell for key, cell in zip(keys, row, strict=True) if cell != "-"} for row in rows]


def elements() -> list[tuple[str, str, int]]:
    """(name, symbol, atomic number) of the 118 elements."""
    words = _ELEMENTS.split()
    return [(name, symbol, n) for n, (name, symbol) in enumerate(zip(words[::2], words[1::2], strict=True), 1)]


def olympics() -> list[tuple[int, str]]:
    """(year, host city) of the Summer Olympics; the games of 2020 took place in 2021."""
    pairs = (entry.split(" ", 1) for entry in _OLYMPICS.strip().split(", "))
    return [(int(year), city) for year, city in pairs]


_OLYMPICS = (
    "1896 Athens, 1900 Paris, 1904 St. Louis, 1908 London, 1912 Stockholm, 1920 Antwerp, 1924 Paris, 1928 Amsterdam, "
    "1932 Los Angeles, 1936 Berlin, 1948 London, 1952 Helsinki, 1956 Melbourne, 1960 Rome, 1964 Tokyo, "
    "1968 Mexico City, 1972 Munich, 1976 Montreal, 1980 Moscow, 1984 Los Angeles, 1988 Seoul, 1992 Barcelona, "
    "1996 Atlanta, 2000 Sydney, 2004 Athens, 2008 Beijing, 2012 London, 2016 Rio de Janeiro, 2020 Tokyo, 2024 Paris"
)

_ELEMENTS = """
hydrogen H helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O fluorine F neon Ne
sodium Na magnesium Mg aluminium Al silicon Si phosphorus P sulfur S chlorine Cl argon Ar potassium K calcium Ca
scandium Sc titanium Ti vanadium V chromium Cr manganese Mn iron Fe cobalt Co nickel Ni copper Cu zinc Zn
gallium Ga germanium Ge arsenic As selenium Se bromine Br krypton Kr rubidium Rb strontium Sr yttrium Y zirconium Zr
niobium Nb molybdenum Mo technetium Tc ruthenium Ru rhodium Rh palladium Pd silver Ag cadmium Cd indium In tin Sn
antimony Sb tellurium Te iodine I xenon Xe caesium Cs barium Ba lanthanum La cerium Ce praseodymium Pr neodymium Nd
promethium Pm samarium Sm europium Eu gadolinium Gd terbium Tb dysprosium Dy holmium Ho erbium Er thulium Tm
ytterbium Yb lutetium Lu hafnium Hf tantalum Ta tungsten W rhenium Re osmium Os iridium Ir platinum Pt gold Au
mercury Hg thallium Tl lead Pb bismuth Bi polonium Po astatine At radon Rn francium Fr radium Ra actinium Ac
thorium Th protactinium Pa uranium U neptunium Np plutonium Pu americium Am curium Cm berkelium Bk californium Cf
einsteinium Es fermium Fm mendelevium Md nobelium No lawrencium Lr rutherfordium Rf dubnium Db seaborgium Sg
bohrium Bh hassium Hs meitnerium Mt darmstadtium Ds roentgenium Rg copernicium Cn nihonium Nh flerovium Fl
moscovium Mc livermorium Lv tennessine Ts oganesson Og
"""

_COUNTRIES = """
Afghanistan | Kabul | Asia | Afghan afghani | Dari
Albania | Tirana | Europe | Albanian lek | Albanian
Algeria | Algiers | Africa | Algerian dinar | Arabic
Andorra | Andorra la Vella | Europe | euro | Catalan
Angola | Luanda | Africa | Angolan kwanza | Portuguese
Antigua and Barbuda | St. John's | North America | East Caribbean dollar | English
Argentina | Buenos Aires | South America | Argentine peso | Spanish
Armenia | Yerevan | Asia | Armenian dram | Armenian
Australia | Canberra | Oceania | Australian dollar | English
Austria | Vienna | Europe | euro | German
Azerbaijan | Baku | Asia | Azerbaijani manat | Azerbaijani
the Bahamas | Nassau | North America | Bahamian dollar | English
Bahrain | Manama | Asia | Bahraini dinar | Arabic
Bangladesh | Dhaka | Asia | Bangladeshi taka | Bengali
Barbados | Bridgetown | North America | Barbadian dollar | English
Belarus | Minsk | Europe | Belarusian ruble | Russian
Belgium | Brussels | Europe | euro | Dutch
Belize | Belmopan | North America | Belize dollar | English
Benin | Porto-Novo | Africa | West African franc | French
Bhutan | Thimphu | Asia | Bhutanese ngultrum | Dzongkha
Bolivia | - | South America | Bolivian boliviano | Spanish
Bosnia and Herzegovina | Sarajevo | Europe | convertible mark | Bosnian
Botswana | Gaborone | Africa | Botswana pula | -
Brazil | Brasilia | South America | Brazilian real | Portuguese
Brunei | Bandar Seri Begawan | Asia | Brunei dollar | Malay
Bulgaria | Sofia | Europe | euro | Bulgarian
Burkina Faso | Ouagadougou | Africa | West African franc | -
Burundi | Gitega | Africa | Burundian franc | Kirundi
Cambodia | Phnom Penh | Asia | Cambodian riel | Khmer
Cameroon | Yaounde | Africa | Central African franc | French
Canada | Ottawa | North America | Canadian dollar | English
Cape Verde | Praia | Africa | Cape Verdean escudo | Portuguese
the Central African Republic | Bangui | Africa | Central African franc | Sango
Chad | N'Djamena | Africa | Central African franc | -
Chile | Santiago | South America | Chilean peso | Spanish
China | Beijing | Asia | Chinese yuan | Mandarin
Colombia | Bogota | South America | Colombian peso | Spanish
the Comoros | Moroni | Africa | Comorian franc | Comorian
the Republic of the Congo | Brazzaville | Africa | Central African franc | French
the Democratic Republic of the Congo | Kinshasa | Africa | Congolese franc | French
Costa Rica | San Jose | North America | Costa Rican colon | Spanish
Croatia | Zagreb | Europe | euro | Croatian
Cuba | Havana | North America | Cuban peso | Spanish
Cyprus | Nicosia | - | euro | Greek
the Czech Republic | Prague | Europe | Czech koruna | Czech
Denmark | Copenhagen | Europe | Danish krone | Danish
Djibouti | Djibouti City | Africa | Djiboutian franc | -
Dominica | Roseau | North America | East Caribbean dollar | English
the Dominican Republic | Santo Domingo | North America | Dominican peso | Spanish
East Timor | Dili | Asia | US dollar | Tetum
Ecuador | Quito | South America | US dollar | Spanish
Egypt | Cairo | Africa | Egyptian pound | Arabic
El Salvador | San Salvador | North America | US dollar | Spanish
Equatorial Guinea | - | Africa | Central African franc | Spanish
Eritrea | Asmara | Africa | Eritrean nakfa | Tigrinya
Estonia | Tallinn | Europe | euro | Estonian
Eswatini | Mbabane | Africa | Swazi lilangeni | Swazi
Ethiopia | Addis Ababa | Africa | Ethiopian birr | Amharic
Fiji | Suva | Oceania | Fijian dollar | -
Finland | Helsinki | Europe | euro | Finnish
France | Paris | Europe | euro | French
Gabon | Libreville | Africa | Central African franc | French
the Gambia | Banjul | Africa | Gambian dalasi | English
Georgia | Tbilisi | Asia | Georgian lari | Georgian
Germany | Berlin | Europe | euro | German
Ghana | Accra | Africa | Ghanaian cedi | English
Greece | Athens | Europe | euro | Greek
Grenada | St. George's | North America | East Caribbean dollar | English
Guatemala | Guatemala City | North America | Guatemalan quetzal | Spanish
Guinea | Conakry | Africa | Guinean franc | -
Guinea-Bissau | Bissau | Africa | West African franc | -
Guyana | Georgetown | South America | Guyanese dollar | English
Haiti | Port-au-Prince | North America | Haitian gourde | Haitian Creole
Honduras | Tegucigalpa | North America | Honduran lempira | Spanish
Hungary | Budapest | Europe | Hungarian forint | Hungarian
Iceland | Reykjavik | Europe | Icelandic krona | Icelandic
India | New Delhi | Asia | Indian rupee | Hindi
Indonesia | Jakarta | Asia | Indonesian rupiah | Indonesian
Iran | Tehran | Asia | Iranian rial | Persian
Iraq | Baghdad | Asia | Iraqi dinar | Arabic
Ireland | Dublin | Europe | euro | English
Israel | - | Asia | Israeli shekel | Hebrew
Italy | Rome | Europe | euro | Italian
Ivory Coast | Yamoussoukro | Africa | West African franc | French
Jamaica | Kingston | North America | Jamaican dollar | English
Japan | Tokyo | Asia | Japanese yen | Japanese
Jordan | Amman | Asia | Jordanian dinar | Arabic
Kazakhstan | Astana | Asia | Kazakhstani tenge | Kazakh
Kenya | Nairobi | Africa | Kenyan shilling | Swahili
Kiribati | - | Oceania | Australian dollar | Gilbertese
Kuwait | Kuwait City | Asia | Kuwaiti dinar | Arabic
Kyrgyzstan | Bishkek | Asia | Kyrgyzstani som | Kyrgyz
Laos | Vientiane | Asia | Lao kip | Lao
Latvia | Riga | Europe | euro | Latvian
Lebanon | Beirut | Asia | Lebanese pound | Arabic
Lesotho | Maseru | Africa | Lesotho loti | Sesotho
Liberia | Monrovia | Africa | Liberian dollar | English
Libya | Tripoli | Africa | Libyan dinar | Arabic
Liechtenstein | Vaduz | Europe | Swiss franc | German
Lithuania | Vilnius | Europe | euro | Lithuanian
Luxembourg | Luxembourg City | Europe | euro | Luxembourgish
Madagascar | Antananarivo | Africa | Malagasy ariary | Malagasy
Malawi | Lilongwe | Africa | Malawian kwacha | Chichewa
Malaysia | Kuala Lumpur | Asia | Malaysian ringgit | Malay
the Maldives | Male | Asia | Maldivian rufiyaa | Dhivehi
Mali | Bamako | Africa | West African franc | Bambara
Malta | Valletta | Europe | euro | Maltese
the Marshall Islands | Majuro | Oceania | US dollar | Marshallese
Mauritania | Nouakchott | Africa | Mauritanian ouguiya | Arabic
Mauritius | Port Louis | Africa | Mauritian rupee | Mauritian Creole
Mexico | Mexico City | North America | Mexican peso | Spanish
Micronesia | Palikir | Oceania | US dollar | English
Moldova | Chisinau | Europe | Moldovan leu | Romanian
Monaco | - | Europe | euro | French
Mongolia | Ulaanbaatar | Asia | Mongolian tugrik | Mongolian
Montenegro | Podgorica | Europe | euro | Montenegrin
Morocco | Rabat | Africa | Moroccan dirham | Arabic
Mozambique | Maputo | Africa | Mozambican metical | Portuguese
Myanmar | Naypyidaw | Asia | Myanmar kyat | Burmese
Namibia | Windhoek | Africa | Namibian dollar | -
Nauru | - | Oceania | Australian dollar | Nauruan
Nepal | Kathmandu | Asia | Nepalese rupee | Nepali
the Netherlands | Amsterdam | Europe | euro | Dutch
New Zealand | Wellington | Oceania | New Zealand dollar | English
Nicaragua | Managua | North America | Nicaraguan cordoba | Spanish
Niger | Niamey | Africa | West African franc | Hausa
Nigeria | Abuja | Africa | Nigerian naira | English
North Korea | Pyongyang | Asia | North Korean won | Korean
North Macedonia | Skopje | Europe | Macedonian denar | Macedonian
Norway | Oslo | Europe | Norwegian krone | Norwegian
Oman | Muscat | Asia | Omani rial | Arabic
Pakistan | Islamabad | Asia | Pakistani rupee | Urdu
Palau | Ngerulmud | Oceania | US dollar | Palauan
Panama | Panama City | North America | Panamanian balboa | Spanish
Papua New Guinea | Port Moresby | Oceania | Papua New Guinean kina | Tok Pisin
Paraguay | Asuncion | South America | Paraguayan guarani | -
Peru | Lima | South America | Peruvian sol | Spanish
the Philippines | Manila | Asia | Philippine peso | Filipino
Poland | Warsaw | Europe | Polish zloty | Polish
Portugal | Lisbon | Europe | euro | Portuguese
Qatar | Doha | Asia | Qatari riyal | Arabic
Romania | Bucharest | Europe | Romanian leu | Romanian
Russia | Moscow | Europe | Russian ruble | Russian
Rwanda | Kigali | Africa | Rwandan franc | Kinyarwanda
Saint Kitts and Nevis | Basseterre | North America | East Caribbean dollar | English
Saint Lucia | Castries | North America | East Caribbean dollar | English
Saint Vincent and the Grenadines | Kingstown | North America | East Caribbean dollar | English
Samoa | Apia | Oceania | Samoan tala | Samoan
San Marino | - | Europe | euro | Italian
Sao Tome and Principe | Sao Tome | Africa | Sao Tomean dobra | Portuguese
Saudi Arabia | Riyadh | Asia | Saudi riyal | Arabic
Senegal | Dakar | Africa | West African franc | Wolof
Serbia | Belgrade | Europe | Serbian dinar | Serbian
Seychelles | Victoria | Africa | Seychellois rupee | Seychellois Creole
Sierra Leone | Freetown | Africa | Sierra Leonean leone | Krio
Singapore | - | Asia | Singapore dollar | English
Slovakia | Bratislava | Europe | euro | Slovak
Slovenia | Ljubljana | Europe | euro | Slovene
the Solomon Islands | Honiara | Oceania | Solomon Islands dollar | Pijin
Somalia | Mogadishu | Africa | Somali shilling | Somali
South Africa | - | Africa | South African rand | Zulu
South Korea | Seoul | Asia | South Korean won | Korean
South Sudan | Juba | Africa | South Sudanese pound | English
Spain | Madrid | Europe | euro | Spanish
Sri Lanka | - | Asia | Sri Lankan rupee | Sinhala
Sudan | Khartoum | Africa | Sudanese pound | Arabic
Suriname | Paramaribo | South America | Surinamese dollar | Dutch
Sweden | Stockholm | Europe | Swedish krona | Swedish
Switzerland | Bern | Europe | Swiss franc | German
Syria | Damascus | Asia | Syrian pound | Arabic
Tajikistan | Dushanbe | Asia | Tajikistani somoni | Tajik
Tanzania | Dodoma | Africa | Tanzanian shilling | Swahili
Thailand | Bangkok | Asia | Thai baht | Thai
Togo | Lome | Africa | West African franc | French
Tonga | Nuku'alofa | Oceania | Tongan paanga | Tongan
Trinidad and Tobago | Port of Spain | North America | Trinidad and Tobago dollar | English
Tunisia | Tunis | Africa | Tunisian dinar | Arabic
Turkey | Ankara | Asia | Turkish lira | Turkish
Turkmenistan | Ashgabat | Asia | Turkmenistani manat | Turkmen
Tuvalu | Funafuti | Oceania | Australian dollar | Tuvaluan
Uganda | Kampala | Africa | Ugandan shilling | English
Ukraine | Kyiv | Europe | Ukrainian hryvnia | Ukrainian
the United Arab Emirates | Abu Dhabi | Asia | UAE dirham | Arabic
the United Kingdom | London | Europe | pound sterling | English
the United States | Washington, D.C. | North America | US dollar | English
Uruguay | Montevideo | South America | Uruguayan peso | Spanish
Uzbekistan | Tashkent | Asia | Uzbekistani som | Uzbek
Vanuatu | Port Vila | Oceania | Vanuatu vatu | Bislama
Vatican City | - | Europe | euro | Italian
Venezuela | Caracas | South America | Venezuelan bolivar | Spanish
Vietnam | Hanoi | Asia | Vietnamese dong | Vietnamese
Yemen | Sanaa | Asia | Yemeni rial | Arabic
Zambia | Lusaka | Africa | Zambian kwacha | English
Zimbabwe | Harare | Africa | Zimbabwe Gold | Shona
"""
