//! `strftime_now` of chat templates, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The present moment in `format`.
pub(super) fn now(format: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(format, seconds)
}

/// A moment, split as calendars do.
struct Civil {
    year: u64,
    /// 1..=12
    month: u64,
    /// 1..=31
    day: u64,
    /// 1..=366
    year_day: u64,
    /// 0 = Sunday
    week_day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// `unix_seconds` in `format`; directives it does not know stay as they are.
fn strftime(format: &str, unix_seconds: u64) -> String {
    let civil = civil(unix_seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let plain = directive == Some('-');
        if plain {
            directive = chars.next();
        }
        match directive.and_then(|d| expand(d, &civil)) {
            Some(text) if plain => out.push_str(text.strip_prefix('0').filter(|t| !t.is_empty()).unwrap_or(&text)),
            Some(text) => out.push_str(&text),
            None => {
                out.push_str(if plain { "%-" } else { "%" });
                out.extend(directive);
            }
        }
    }
    out
}

fn expand(directive: char, t: &Civil) -> Option<String> {
    let month = MONTHS.get(t.month.saturating_sub(1) as usize).copied().unwrap_or("");
    let day = DAYS.get(t.week_day as usize).copied().unwrap_or("");
    let short = |name: &str| name.chars().take(3).collect::<String>();
    let hour12 = if t.hour.is_multiple_of(12) { 12 } else { t.hour % 12 };
    Some(match directive {
        'Y' => t.year.to_string(),
        'y' => format!("{:02}", t.year % 100),
        'm' => format!("{:02}", t.month),
        'd' => format!("{:02}", t.day),
        'e' => format!("{:2}", t.day),
        'j' => format!("{:03}", t.year_day),
        'B' => month.into(),
        'b' | 'h' => short(month),
        'A' => day.into(),
        'a' => short(day),
        'H' => format!("{:02}", t.hour),
        'I' => format!("{hour12:02}"),
        'M' => format!("{:02}", t.minute),
        'S' => format!("{:02}", t.second),
        'p' => if t.hour < 12 { "AM" } else { "PM" }.into(),
        'F' => format!("{}-{:02}-{:02}", t.year, t.month, t.day),
        'T' => format!("{:02}:{:02}:{:02}", t.hour, t.minute, t.second),
        'Z' => "UTC".into(),
        'z' => "+0000".into(),
        '%' => "%".into(),
        _ => return None,
    })
}

fn civil(unix_seconds: u64) -> Civil {
    let (mut days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let week_day = (days + 4) % 7; // 1970-01-01 was a Thursday
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970 + (days / 146_097) * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let year_day = days + 1;
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    Civil {
        year,
        month,
        day: days + 1,
        year_day,
        week_day,
        hour: seconds / 3600,
        minute: seconds / 60 % 60,
        second: seconds % 60,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_read_as_python_prints_them() {
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %A %j", 0), "1970-01-01 00:00:00 Thursday 001");
        assert_eq!(strftime("%d %b %Y, %I %p", 1_709_210_096), "29 Feb 2024, 12 PM");
        assert_eq!(strftime("%-d %B %y %% %Q", 1_735_689_599), "31 December 24 % %Q");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
    }
}
